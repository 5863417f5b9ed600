"""Convert prompts to the format of the trainer: texts, or chats that the tokenizer's chat template
renders.

With ``dataset.chat``, a text becomes a user message. A system prompt becomes the first message of a
chat, unless the chat already has a system message. If a prompt stays a text, the system prompt and
an empty line are put before the prompt.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, TypeAlias

from toolkit.base.errors import ConfigError
from toolkit.config import chat_format
from toolkit.config.build_config import thaw
from toolkit.config.data_types import prompt_fault
from toolkit.policy.render_template import template_error

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

TemplateArguments: TypeAlias = "Mapping[str, Any] | None"
Prompt = str | list[dict[str, Any]]
TEMPLATE_TOKENS = 200
"""More than the number of tokens that a chat template adds for a message."""
SAMPLED_PROMPTS = 64
"""The number of prompts in which unknown tokens are counted."""
WARN_UNKNOWN_SHARE = 0.05
"""The run warns if at least this share of tokens is unknown. A few rare characters are normal."""


def check_prompts(prompts: Sequence[Any], column: str, location: Callable[[int], str]) -> bool:
    """Return True if the column contains chats, False if it contains texts. The first prompt
    decides this.

    Raises ConfigError if a later prompt has the other type, or if a prompt is invalid. The error
    contains the place of the row.
    """
    present = [prompt for prompt in prompts if prompt is not None]
    is_chat = bool(present) and isinstance(present[0], list)
    for index, prompt in enumerate(prompts):
        if problem := prompt_fault(prompt, chats=is_chat):
            raise ConfigError(f"column {column!r} {problem}", where=location(index))
    return is_chat


def is_empty(prompt: Any) -> bool:
    """Whether the prompt has no text. A chat is empty if none of its messages has content."""
    if isinstance(prompt, list):
        return not any(message.get("content") for message in prompt)
    return prompt is None or not prompt.strip()


def format_prompt(prompt: Prompt, system: str | None, *, chat: bool) -> Prompt:
    """Return ``prompt`` with the system prompt, as a text or a chat. The docstring of this module
    describes the format.
    """
    if isinstance(prompt, str):
        if not chat:
            return f"{system}\n\n{prompt}" if system else prompt
        prompt = [{"role": "user", "content": prompt}]
    if not system or prompt[0]["role"] in ("system", "developer"):
        return prompt
    return [{"role": "system", "content": system}, *prompt]


def check_template(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    column: str,
    template: TemplateArguments = None,
) -> None:
    """Render one chat, so that a chat template that rejects chats is reported before the first
    step.

    Raises:
        ConfigError: the tokenizer has no chat template, or the template rejects the chat.
    """
    if not chat_format.is_usable_template(getattr(tokenizer, "chat_template", None)):
        raise ConfigError(
            chat_format.CHATS_WITHOUT_TEMPLATE.format(column=repr(column)),
            fix=chat_format.CHATS_WITHOUT_TEMPLATE_FIX,
        )
    try:
        count_tokens(tokenizer, prompt, template)
    except ConfigError:  # for example, the template exceeds its limits
        raise
    except Exception as error:  # the tokenizer may come from a user's script
        raise template_error(tokenizer, error) from error


def token_ids(
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    template: TemplateArguments = None,
) -> list[list[int]]:
    """Return the token ids of each prompt (a text, or a list of chat messages). Prompts are
    tokenized as in the trainer: with special tokens and the chat template. ``template`` is
    ``grpo.chat_template_kwargs``.
    """
    if prompts and isinstance(prompts[0], list):
        rendered = tokenizer.apply_chat_template(
            list(prompts),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **(thaw(template) or {}),
        )
        return list(rendered["input_ids"])
    return list(tokenizer(text=list(prompts))["input_ids"])


def unknown_tokens_note(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    template: TemplateArguments = None,
) -> list[str]:
    """Return a note for the user if a large part of the first prompts becomes the tokenizer's
    unknown token. The model cannot read this part. Otherwise return an empty list.
    """
    unknown_id = _unknown_token_id(tokenizer)
    if unknown_id is None or not prompts:
        return []
    try:
        ids = [
            token_id
            for row in token_ids(prompts[:SAMPLED_PROMPTS], tokenizer, template)
            for token_id in row
        ]
    except Exception:  # noqa: BLE001 - a template that rejects a prompt is reported where it is used
        return []
    share = ids.count(unknown_id) / max(1, len(ids))
    if share < WARN_UNKNOWN_SHARE:
        return []
    return [
        f"{share:.0%} of the tokens of the first prompts are unknown to the tokenizer "
        f"({tokenizer.convert_ids_to_tokens(unknown_id)}), so the model cannot read them"
    ]


def _unknown_token_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of the tokenizer's unknown token; None if it has no unknown token. If the
    tokenizer has no attribute ``unk_token_id``, its backend model names the token.
    """
    if (token_id := getattr(tokenizer, "unk_token_id", None)) is not None:
        return int(token_id)
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    name = getattr(model, "unk_token", None)
    token_id = tokenizer.convert_tokens_to_ids(name) if name else None
    return None if token_id is None else int(token_id)


def count_tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, template: TemplateArguments = None
) -> int:
    """Return the number of tokens of a prompt, with special tokens and the chat template as in the
    trainer.
    """
    return len(token_ids([prompt], tokenizer, template)[0])


def may_be_longer(prompt: Prompt, limit: int) -> bool:
    """Whether ``prompt`` may have more than ``limit`` tokens, according to the size of its text. A
    token has at least one byte. Each message of a chat may have ``TEMPLATE_TOKENS`` more tokens.
    """
    messages = prompt if isinstance(prompt, list) else [{"content": prompt}]
    texts = json.dumps(messages, ensure_ascii=False)
    return len(texts.encode(errors="replace")) + TEMPLATE_TOKENS * (len(messages) + 1) > limit


def truncate_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    limit: int,
    template: TemplateArguments = None,
) -> Prompt:
    """Remove tokens from the beginning of ``prompt``, so that at most ``limit`` tokens remain.

    In a chat, the first tokens of the oldest messages are removed, but the system message is kept.
    Raises ConfigError if the prompt cannot become short enough.
    """
    if isinstance(prompt, str):
        shortened = _drop_first_tokens(
            tokenizer, prompt, lambda text: count_tokens(tokenizer, text) - limit
        )
        if shortened:
            return shortened
        raise _cannot_shorten_error(limit, "the special tokens", count_tokens(tokenizer, ""))
    messages = [dict(message) for message in prompt]
    for message in messages:
        text = message.get("content")
        if message["role"] in ("system", "developer") or not isinstance(text, str):
            continue

        def excess_with(text: str, message: dict[str, Any] = message) -> int:
            message["content"] = text
            return count_tokens(tokenizer, messages, template) - limit

        message["content"] = _drop_first_tokens(tokenizer, text, excess_with)
        if count_tokens(tokenizer, messages, template) <= limit:
            return messages
    raise _cannot_shorten_error(
        limit, "system prompt and chat template", count_tokens(tokenizer, messages, template)
    )


def _cannot_shorten_error(limit: int, fixed_part: str, fixed_tokens: int) -> ConfigError:
    return ConfigError(
        f"a prompt cannot be shortened to grpo.max_prompt_length ({limit} tokens), because "
        f"{fixed_part} alone have {fixed_tokens} tokens",
        fix="raise `grpo.max_prompt_length`, or shorten `dataset.system`",
    )


def _drop_first_tokens(
    tokenizer: PreTrainedTokenizerBase, text: str, count_excess: Callable[[str], int]
) -> str:
    """Remove tokens from the beginning of ``text`` until it is short enough, and return the rest,
    which may be empty. ``count_excess(text)`` returns by how many tokens ``text`` is too long.

    After each removal, the tokens of the rest are counted again, because the first characters of
    the rest may be tokenized differently.
    """
    starts = _token_starts(tokenizer, text)
    dropped = 0
    while text and (excess := count_excess(text[starts[dropped] :] if dropped else text)) > 0:
        dropped += excess
        if dropped >= len(starts):
            count_excess("")
            return ""
    return text[starts[dropped] :] if dropped else text


def _token_starts(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return a list with one number per token of ``text``: the index of its first character."""
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return [start for start, _ in encoded["offset_mapping"]]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ends = [len(tokenizer.decode(ids[index:])) for index in range(len(ids))]
    return [max(0, len(text) - length) for length in ends]
