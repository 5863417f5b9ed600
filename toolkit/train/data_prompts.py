"""Prompts as the trainer takes them: texts, or chats that the tokenizer's template renders.

A plain prompt stays plain, with one exception: a system prompt over a tokenizer that has a chat
template makes it a chat of a system and a user message, because that is how such a model was
taught to read one. Over a tokenizer without a template the system prompt stands before the prompt
with an empty line between. A chat gets it as its first message, unless it has a system message of
its own, which then stays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.base.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Prompt = str | list[dict[str, Any]]
ROLES = ("system", "developer", "user", "assistant", "tool")


def check_prompts(prompts: Sequence[Any], column: str, place: Callable[[int], str]) -> bool:
    """Whether the column holds chats (else texts). Raises ConfigError naming the first bad row."""
    chats = [prompt for prompt in prompts if prompt is not None]
    is_chat = bool(chats) and isinstance(chats[0], list)
    for index, prompt in enumerate(prompts):
        wrong = None
        if is_chat:
            wrong = _wrong_chat(prompt or [])
        elif not isinstance(prompt, str | None):
            wrong = f"is {type(prompt).__name__}, not a text or a list of messages"
        if wrong:
            raise ConfigError(f"column {column!r} {wrong}", where=place(index))
    return is_chat


def _wrong_chat(messages: list[Any]) -> str | None:
    """What is wrong with a chat prompt, in words; None if nothing is."""
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return f"message {number} has no role: each is {{role: ..., content: ...}}"
        if message["role"] not in ROLES:
            return (
                f"message {number} has the role {message['role']!r}, not one of {', '.join(ROLES)}"
            )
        if "content" not in message or not isinstance(message["content"], str | list | None):
            return f"message {number} has no content that is a text"
    if messages and messages[-1]["role"] == "assistant":
        return (
            "ends with what the assistant says, so there is nothing left to answer: leave that "
            "message out (an expected answer goes into a column of its own)"
        )
    return None


def is_empty(prompt: Any) -> bool:
    """Nothing to answer: no text, or no message with any."""
    if isinstance(prompt, list):
        return not any(message.get("content") for message in prompt)
    return prompt is None or not prompt.strip()


def with_system(prompt: Prompt, system: str, *, has_template: bool) -> Prompt:
    """``prompt`` under a system prompt, by the rule at the head of this module."""
    message = {"role": "system", "content": system}
    if isinstance(prompt, str):
        if has_template:
            return [message, {"role": "user", "content": prompt}]
        return f"{system}\n\n{prompt}"
    if prompt[0]["role"] in ("system", "developer"):
        return prompt
    return [message, *prompt]


def check_template(tokenizer: Any, prompt: Prompt, column: str) -> None:
    """Render one chat, so that a template that refuses it is told now and not in the first step."""
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f"column {column!r} holds chats, and this tokenizer has no chat template",
            fix="use plain prompts, or a model with a chat template (an instruct model)",
        )
    try:
        length_of(tokenizer, prompt)
    except ConfigError:  # it takes too long, or makes too much
        raise
    except Exception as error:  # a template raises what it likes, jinja2's and its own
        raise ConfigError(
            f"the tokenizer's chat template refuses the prompts: {error}",
            fix="some templates take no system message: then put dataset.system into the prompts",
        ) from error


def length_of(tokenizer: Any, prompt: Prompt) -> int:
    """Tokens of a prompt as the trainer counts them: special tokens and the template included."""
    if isinstance(prompt, str):
        return len(tokenizer(prompt)["input_ids"])
    rendered = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    return len(rendered["input_ids"])


def truncate(tokenizer: Any, prompt: Prompt, limit: int) -> Prompt:
    """``prompt`` without its beginning, so that it has at most ``limit`` tokens.

    A text loses its first tokens. A chat keeps its system message, its template and the order of
    its messages; the texts of the oldest other messages lose their first tokens. Raises ConfigError
    where that cannot be enough.
    """
    if isinstance(prompt, str):
        rest = _cut(tokenizer, prompt, lambda text: length_of(tokenizer, text) - limit)
        if rest:
            return rest
        raise _too_short(limit, "the special tokens", length_of(tokenizer, ""))
    kept = [dict(message) for message in prompt]
    for message in kept:
        text = message.get("content")
        if message["role"] in ("system", "developer") or not isinstance(text, str):
            continue

        def over(text: str, message: dict[str, Any] = message) -> int:
            message["content"] = text
            return length_of(tokenizer, kept) - limit

        message["content"] = _cut(tokenizer, text, over)
        if length_of(tokenizer, kept) <= limit:
            return kept
    raise _too_short(limit, "system prompt and template", length_of(tokenizer, kept))


def _too_short(limit: int, what: str, tokens: int) -> ConfigError:
    return ConfigError(
        f"a prompt cannot be cut to grpo.max_prompt_length {limit}: "
        f"{what} alone have {tokens} tokens",
        fix="raise grpo.max_prompt_length, or shorten dataset.system",
    )


def _cut(tokenizer: Any, text: str, over: Callable[[str], int]) -> str:
    """``text`` without as many of its first tokens as make ``over(text)`` at most 0, or empty.

    Tokens can join anew at the cut, so what is left is counted again.
    """
    starts = _token_starts(tokenizer, text)
    dropped = 0
    while text and (excess := over(text[starts[dropped] :] if dropped else text)) > 0:
        dropped += excess
        if dropped >= len(starts):
            over("")
            return ""
    return text[starts[dropped] :] if dropped else text


def _token_starts(tokenizer: Any, text: str) -> list[int]:
    """Where each token of ``text`` begins, in characters."""
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return [start for start, _ in encoded["offset_mapping"]]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ends = [len(tokenizer.decode(ids[index:])) for index in range(len(ids))]
    return [max(0, len(text) - length) for length in ends]
