"""Run chat templates and response templates with limits, because a template is a program that
comes with the checkpoint.

transformers renders a template in jinja's sandbox. The sandbox protects the process, but does not
limit time or the size of the text. This module limits the time and the memory of a rendering, and
checks the size of the text before the text is tokenized. The limits are set in this process, by an
alarm signal and an address space limit. Rendering in another process would be too slow, because
there may be a million chats, and one chat takes only a tenth of a millisecond.
"""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from toolkit.base.errors import ConfigError, first_line
from toolkit.base.time_limits import OutOfTime, call_within, limit_extra_memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerBase

TIME_LIMIT_S = 10.0
TIME_PER_CHAT_S = 0.1  # additional time per chat of a batch
MEMORY_LIMIT_BYTES = 1 << 30
# The text of a chat may have at most BASE_LIMIT_CHARACTERS + MAX_GROWTH * (characters of the input)
# characters.
BASE_LIMIT_CHARACTERS = 1_000_000
MAX_GROWTH = 20
_TEMPLATE_PLACE = "chat_template.jinja or tokenizer_config.json in the model's folder"
MAX_DEPTH = 64
"""The maximum number of levels of lists and objects in a message that is read from a completion."""


def limit_template(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Replace ``apply_chat_template`` and ``parse_response`` of ``tokenizer`` by versions that
    raise ConfigError if the chat template or the response template takes too long or makes too
    much text. Returns ``tokenizer``.
    """
    tokenizer.apply_chat_template = _LimitedTemplate(tokenizer)
    if hasattr(type(tokenizer), "parse_response"):
        tokenizer.parse_response = _LimitedParser(tokenizer)
    return tokenizer


class _LimitedTemplate:
    """The method that replaces ``apply_chat_template`` of a tokenizer. It is an object of this
    class and not a function, so that it can be copied and pickled with the tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _apply_template(self._tokenizer, args, kwargs)


class _LimitedParser:
    """The method that replaces ``parse_response`` of a tokenizer. It calls the original method with
    a time limit and a memory limit. That method reads tool calls from a completion, with the
    regular expressions of the tokenizer's response template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tokenizer = self._tokenizer
        upstream = type(tokenizer).parse_response
        try:
            with limit_extra_memory(MEMORY_LIMIT_BYTES):
                return _escape_and_check_depth(
                    call_within(TIME_LIMIT_S, lambda: upstream(tokenizer, *args, **kwargs))
                )
        except OutOfTime:
            raise _parser_error(tokenizer, f"did not end within {TIME_LIMIT_S:g} s") from None
        except (ValueError, TypeError):
            raise  # TRL then uses the completion as a plain text
        except RecursionError as error:
            raise ValueError("the completion is nested too deeply") from error
        except Exception as error:
            problem = f"cannot be used: {type(error).__name__}: {first_line(error)}"
            raise _parser_error(tokenizer, problem) from error


def _escape_and_check_depth(value: object, levels_left: int = MAX_DEPTH) -> Any:
    """Return ``value`` with each lone surrogate replaced by its escape code. A model can write half
    of a character as an escape in JSON, and a text with such a lone surrogate cannot be tokenized.

    Raises ValueError if ``value`` is nested more than ``levels_left`` levels deep.
    """
    if isinstance(value, str):
        return _escape_surrogates(value)
    if not isinstance(value, (dict, list, tuple)):
        return value
    if levels_left == 0:
        raise ValueError(f"the completion is nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, dict):
        return {
            _escape_and_check_depth(key, 1): _escape_and_check_depth(item, levels_left - 1)
            for key, item in value.items()
        }
    return [_escape_and_check_depth(item, levels_left - 1) for item in value]


def _escape_surrogates(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


def _tokenizer_name(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the name or folder of the tokenizer, for messages."""
    return str(getattr(tokenizer, "name_or_path", "")) or None


def _parser_error(tokenizer: PreTrainedTokenizerBase, problem: str) -> ConfigError:
    return ConfigError(
        f"the tokenizer's response template, which finds the tool calls, {problem}",
        where=_tokenizer_name(tokenizer),
        fix="replace response_template in tokenizer_config.json in the model's folder, or get the "
        "model from a source that you trust",
    )


def _apply_template(
    tokenizer: PreTrainedTokenizerBase, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Do the same as ``apply_chat_template`` of transformers 5.17, in two steps: render the text
    with limits, and then tokenize it.
    """
    upstream = type(tokenizer).apply_chat_template
    arguments = {**_default_arguments(upstream), **kwargs}
    if len(args) > 1:
        arguments.update(inspect.signature(upstream).bind(tokenizer, *args).arguments)
    if not arguments["tokenize"] or arguments["return_assistant_tokens_mask"]:
        return _render_limited(tokenizer, args, kwargs)
    text = _render_limited(tokenizer, args, {**kwargs, "tokenize": False})
    encoded = tokenizer(
        text,
        padding=arguments["padding"],
        truncation=arguments["truncation"],
        max_length=arguments["max_length"],
        add_special_tokens=False,
        return_tensors=arguments["return_tensors"],
        **(arguments["tokenizer_kwargs"] or {}),
    )
    return encoded if arguments["return_dict"] else encoded["input_ids"]


@lru_cache
def _default_arguments(upstream: Callable[..., Any]) -> dict[str, Any]:
    return {name: p.default for name, p in inspect.signature(upstream).parameters.items()}


def _render_limited(
    tokenizer: PreTrainedTokenizerBase, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    upstream = type(tokenizer).apply_chat_template
    characters, num_chats = _count_characters([args, kwargs]), 1
    chat = args[0] if args else kwargs.get("conversation")
    if isinstance(chat, list | tuple) and chat and isinstance(chat[0], list | tuple):
        num_chats = len(chat)
    time_limit_s = TIME_LIMIT_S + TIME_PER_CHAT_S * num_chats
    max_characters = BASE_LIMIT_CHARACTERS * num_chats + MAX_GROWTH * characters
    try:
        with limit_extra_memory(MEMORY_LIMIT_BYTES + 4 * max_characters):
            rendered = call_within(time_limit_s, lambda: upstream(tokenizer, *args, **kwargs))
    except OutOfTime:
        raise _limit_error(tokenizer, f"did not end within {time_limit_s:g} s") from None
    except (MemoryError, OverflowError) as error:
        raise _limit_error(
            tokenizer, f"needs too much memory ({type(error).__name__}; the limit is 1 GiB)"
        ) from None
    except Exception as error:  # a template may raise any error, jinja2's or its own
        raise template_error(tokenizer, error) from error
    rendered_characters = _count_characters(rendered) if isinstance(rendered, str | list) else 0
    if rendered_characters > max_characters:
        problem = (
            f"makes a text of {rendered_characters} characters from a chat of {characters} "
            f"characters, but the limit is {max_characters}"
        )
        raise _limit_error(tokenizer, problem)
    return _escape_surrogates(rendered) if isinstance(rendered, str) else rendered


def template_error(tokenizer: PreTrainedTokenizerBase, error: Exception) -> ConfigError:
    """Return the error for a template that raised ``error``, or for a tokenizer without a chat
    template.
    """
    reason = first_line(error) or type(error).__name__
    if not getattr(tokenizer, "chat_template", None):
        return ConfigError(
            "the prompts are lists of messages, but the tokenizer has no chat template",
            where=_tokenizer_name(tokenizer),
            fix="use an instruct model, or write the prompts as plain text, or set a template in "
            'your script with `tokenizer = get_chat_template(tokenizer, "chatml")`',
        )
    if any(kind.__name__ == "TemplateSyntaxError" for kind in type(error).__mro__):  # jinja2's
        line = getattr(error, "lineno", None)
        return ConfigError(
            "the tokenizer's chat template is not a valid template"
            f"{f' (line {line})' if line else ''}: {reason}",
            where=_tokenizer_name(tokenizer),
            fix=f"correct or replace the template. It is in {_TEMPLATE_PLACE}",
        )
    return ConfigError(
        f"the tokenizer's chat template rejects the prompts: {reason}",
        where=_tokenizer_name(tokenizer),
        fix="use only roles that the template supports, in the order that it supports. If it does "
        "not support a system message, put the text of dataset.system into the prompts. "
        f"Alternatively, replace the template. It is in {_TEMPLATE_PLACE}",
    )


def _limit_error(tokenizer: PreTrainedTokenizerBase, problem: str) -> ConfigError:
    return ConfigError(
        f"the chat template of this tokenizer {problem}",
        where=_tokenizer_name(tokenizer),
        fix=f"replace the template in {_TEMPLATE_PLACE}, or get the model from a source that you "
        "trust",
    )


def _count_characters(value: object) -> int:
    """Return the number of characters of all texts in nested lists and mappings."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(_count_characters(key) + _count_characters(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return sum(map(_count_characters, value))
    return 0
