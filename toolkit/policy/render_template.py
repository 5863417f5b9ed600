"""Run chat templates with limits, because a template is a program that comes with the checkpoint.

transformers renders a template in jinja's sandbox, which protects the process but does not limit
time or the size of the text. Here a rendering has limited time and memory, and the size of its text
is checked before the text is tokenized. The limits are an alarm and an address space limit in this
process: another process would be too slow, because a chat takes a tenth of a millisecond and there
may be a million chats.
"""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from toolkit.base.errors import ConfigError, first_line
from toolkit.base.time_limits import OutOfTime, call_within, memory_within

if TYPE_CHECKING:
    from collections.abc import Callable

TIME_S = 10.0
EACH_S = 0.1  # additional time per chat of a batch
MEMORY_BYTES = 1 << 30
LONGEST = 1_000_000  # characters that a template may add ...
TIMES = 20  # ... and how many times as long as its input the text may be


def limit_template(tokenizer: Any) -> Any:
    """Give ``tokenizer`` an ``apply_chat_template`` that raises ConfigError if the template exceeds
    the limits, and return it.
    """
    tokenizer.apply_chat_template = _LimitedTemplate(tokenizer)
    return tokenizer


class _LimitedTemplate:
    """A callable attribute of one tokenizer. Unlike a bound function, it is copied and pickled with
    the tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _apply(self._tokenizer, args, kwargs)


def _apply(tokenizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Do what ``apply_chat_template`` of transformers 5.17 does, but render the text first and then
    tokenize it.
    """
    upstream = type(tokenizer).apply_chat_template
    values = {**_defaults(upstream), **kwargs}
    if len(args) > 1:
        values.update(inspect.signature(upstream).bind(tokenizer, *args).arguments)
    if not values["tokenize"] or values["return_assistant_tokens_mask"]:
        return _limited(tokenizer, args, kwargs)
    text = _limited(tokenizer, args, {**kwargs, "tokenize": False})
    encoded = tokenizer(
        text,
        padding=values["padding"],
        truncation=values["truncation"],
        max_length=values["max_length"],
        add_special_tokens=False,
        return_tensors=values["return_tensors"],
        **(values["tokenizer_kwargs"] or {}),
    )
    return encoded if values["return_dict"] else encoded["input_ids"]


@lru_cache
def _defaults(upstream: Callable[..., Any]) -> dict[str, Any]:
    return {name: p.default for name, p in inspect.signature(upstream).parameters.items()}


def _limited(tokenizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    upstream = type(tokenizer).apply_chat_template
    characters, chats = _size([args, kwargs]), 1
    chat = args[0] if args else kwargs.get("conversation")
    if isinstance(chat, list | tuple) and chat and isinstance(chat[0], list | tuple):
        chats = len(chat)
    seconds = TIME_S + EACH_S * chats
    most = LONGEST * chats + TIMES * characters
    try:
        with memory_within(MEMORY_BYTES + 4 * most):
            made = call_within(seconds, lambda: upstream(tokenizer, *args, **kwargs))
    except OutOfTime:
        raise _too_much(tokenizer, f"did not end within {seconds:g} s") from None
    except (MemoryError, OverflowError) as error:
        raise _too_much(
            tokenizer, f"needs too much memory ({type(error).__name__}; the limit is 1 GiB)"
        ) from None
    except Exception as error:  # a template may raise any error, jinja2's or its own
        raise refused(tokenizer, error) from error
    size = _size(made) if isinstance(made, str | list) else 0
    if size > most:
        what = (
            f"makes a text of {size} characters from a chat with {characters} (the limit is {most})"
        )
        raise _too_much(tokenizer, what)
    return made


def refused(tokenizer: Any, error: Exception) -> ConfigError:
    """The error for a template that raised ``error``, or for a tokenizer without one."""
    said = first_line(error) or type(error).__name__
    if not getattr(tokenizer, "chat_template", None):
        return ConfigError(
            "the prompts are lists of messages, and the tokenizer has no chat template",
            where=str(getattr(tokenizer, "name_or_path", "")) or None,
            fix="use an instruct model, write the prompts as plain texts, or in a script set a "
            'template: tokenizer = get_chat_template(tokenizer, "chatml")',
        )
    return ConfigError(
        f"the tokenizer's chat template rejects the prompts: {said}",
        where=str(getattr(tokenizer, "name_or_path", "")) or None,
        fix="use only roles that it supports, in their order (if it does not support a system "
        "message, put dataset.system into the prompts), or replace chat_template.jinja in "
        "the model's folder",
    )


def _too_much(tokenizer: Any, what: str) -> ConfigError:
    return ConfigError(
        f"the chat template of this tokenizer {what}",
        where=str(getattr(tokenizer, "name_or_path", "")) or None,
        fix="replace chat_template.jinja (or chat_template in tokenizer_config.json) in the "
        "model's folder, or get the model from a source that you trust",
    )


def _size(value: Any) -> int:
    """The number of characters of all texts in a tree of lists and mappings."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(_size(key) + _size(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return sum(map(_size, value))
    return 0
