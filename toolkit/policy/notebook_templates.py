"""Provide the helpers for chat templates that notebooks import. A template comes from the
checkpoint; these functions check that it is the expected one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.base.errors import ConfigValueError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Mapping

WHERE = "get_chat_template"
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKS: Mapping[str, str] = {
    "chatml": "<|im_start|>",
    "qwen": "<|im_start|>",
    "llama-3": "<|start_header_id|>",
    "gemma-4": "<|turn>",
    "gemma": "<start_of_turn>",
    "phi-4": "<|im_sep|>",
    "phi": "<|end|>",
    "mistral": "[INST]",
    "gpt-oss": "<|channel|>",
}
"""For each family of models, by the beginning of its name: a text that the family's chat template
contains.
"""
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
    "assistant": "assistant", "model": "assistant", "bot": "assistant", "system": "system",
    "tool": "tool", "function": "tool",
}  # fmt: skip
"""A mapping from ShareGPT's names of roles to the roles of chat templates."""


def get_chat_template(
    tokenizer: Any,
    chat_template: str | tuple[str, str] = "chatml",
    mapping: Mapping[str, str] | None = None,
    map_eos_token: bool = True,
    system_message: str | None = None,
) -> Any:
    """Return ``tokenizer`` with the requested chat template.

    ``chat_template`` is Jinja text, or the name of a family ("llama-3.1", "qwen-2.5", "gemma-3",
    "chatml", ...). A family's template is the one in its instruct checkpoints: a tokenizer that has
    it is returned unchanged. Only ChatML is also set on a tokenizer without a template.

    Raises:
        ConfigValueError: the tokenizer has no template of that family.
        UnsupportedError: ``mapping`` to other keys than role and content, or a ``system_message``.
    """
    _refuse_extras(mapping, system_message)
    text = chat_template if isinstance(chat_template, str) else chat_template[0]
    if "{%" in text or "{{" in text:
        tokenizer.chat_template = text
        return tokenizer
    mark = next((mark for name, mark in MARKS.items() if text.startswith(name)), None)
    own = str(tokenizer.chat_template or "")
    if mark is not None and mark in own:
        return tokenizer
    if text == "chatml" and not own:
        tokenizer.chat_template = CHATML
        if map_eos_token and "<|im_end|>" in tokenizer.get_vocab():
            tokenizer.eos_token = "<|im_end|>"
        return tokenizer
    has = "has no chat template" if not own else "has a chat template of another family"
    raise ConfigValueError(
        f"chat_template={text!r}, but the tokenizer {has}",
        where=WHERE,
        fix="load the instruct checkpoint, whose tokenizer has the template, or set "
        "tokenizer.chat_template to the template's text",
    )


def standardize_data_formats(dataset: Any, *, column: str | None = None) -> Any:
    """Convert the chats of ``dataset`` (of the datasets library) to lists of ``role`` and
    ``content``.

    ShareGPT's ``from`` and ``value`` are renamed; chats with role and content stay unchanged.
    ``column`` None means the first existing column of conversations, messages and prompt.
    """
    names = [column] if column else ["conversations", "messages", "prompt"]
    found = next((name for name in names if name in dataset.column_names), None)
    if found is None:
        raise ConfigValueError(
            f"the data set has no column {' or '.join(names)}: {', '.join(dataset.column_names)}",
            where="standardize_data_formats",
            fix="name the column of the chats: column=...",
        )
    return dataset.map(lambda row: {found: [_message(turn) for turn in row[found]]})


def _message(turn: Mapping[str, Any]) -> dict[str, Any]:
    who = turn.get("role") or turn.get("from")
    said = turn.get("content") if turn.get("content") is not None else turn.get("value")
    if who is None or said is None:
        raise ConfigValueError(
            f"a turn of a chat has the keys {', '.join(map(str, turn))}",
            where="standardize_data_formats",
            fix="a turn must have role and content, or from and value",
        )
    return {"role": ROLES.get(str(who), str(who)), "content": said}


def train_on_responses_only(trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """Always raises UnsupportedError: this function sets the loss mask of supervised
    fine-tuning.
    """
    del trainer, args, kwargs
    raise UnsupportedError(
        "TRL masks the loss of supervised fine-tuning",
        where="train_on_responses_only",
        fix="pass SFTConfig(assistant_only_loss=True) or completion_only_loss=True",
    )


def _refuse_extras(mapping: Mapping[str, str] | None, system_message: str | None) -> None:
    keys = {name: value for name, value in (mapping or {}).items() if name in ("role", "content")}
    if any(name != value for name, value in keys.items()):
        raise UnsupportedError(
            f"mapping={dict(mapping or {})!r}: only the keys role and content are supported",
            where=WHERE,
            fix="rename the keys with standardize_data_formats(dataset)",
        )
    if system_message is not None:
        raise UnsupportedError(
            "system_message is not supported as part of a template",
            where=WHERE,
            fix="put a message with role system at the start of each prompt",
        )


standardize_sharegpt = standardize_data_formats
