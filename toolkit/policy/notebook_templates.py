"""Provide the functions for chat templates that notebooks import.

The chat template comes from the checkpoint's tokenizer. ``get_chat_template`` checks that this
template belongs to the model family that the notebook names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.base.errors import ConfigValueError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedTokenizerBase

WHERE = "get_chat_template"
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
FAMILY_MARKERS: Mapping[str, str] = {
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
"""A mapping from the beginning of a model family's name to a text that only the family's chat
template contains.
"""
SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
    "assistant": "assistant", "model": "assistant", "bot": "assistant", "system": "system",
    "tool": "tool", "function": "tool",
}  # fmt: skip
"""A mapping from the role names of the ShareGPT format to the roles of chat templates."""


def get_chat_template(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | tuple[str, str] = "chatml",
    mapping: Mapping[str, str] | None = None,
    map_eos_token: bool = True,
    system_message: str | None = None,
) -> Any:
    """Return ``tokenizer`` with the requested chat template.

    ``chat_template`` is Jinja text, or the name of a model family ("llama-3.1", "qwen-2.5",
    "gemma-3", "chatml", ...). Jinja text is set on the tokenizer. For the name of a family, the
    tokenizer must already have the template of that family, and is returned unchanged. For "chatml"
    there is an exception: if the tokenizer has no template, the template of ChatML is set.

    Raises:
        ConfigValueError: the tokenizer does not have a template of that family.
        UnsupportedError: ``mapping`` maps to keys other than role and content, or
            ``system_message`` is given.
    """
    _refuse_extras(mapping, system_message)
    text = chat_template if isinstance(chat_template, str) else chat_template[0]
    if "{%" in text or "{{" in text:
        tokenizer.chat_template = text
        return tokenizer
    marker = next(
        (marker for name, marker in FAMILY_MARKERS.items() if text.startswith(name)), None
    )
    current_template = str(tokenizer.chat_template or "")
    if marker is not None and marker in current_template:
        return tokenizer
    if text == "chatml" and not current_template:
        tokenizer.chat_template = CHATML
        if map_eos_token and "<|im_end|>" in tokenizer.get_vocab():
            tokenizer.eos_token = "<|im_end|>"
        return tokenizer
    problem = (
        "has no chat template" if not current_template else "has a chat template of another family"
    )
    raise ConfigValueError(
        f"chat_template={text!r}, but the tokenizer {problem}",
        where=WHERE,
        fix="load the instruct checkpoint, whose tokenizer has the template, or set "
        "tokenizer.chat_template to the template's text",
    )


def standardize_data_formats(dataset: Any, *, column: str | None = None) -> Any:
    """Convert the chats of ``dataset`` to lists of messages with ``role`` and ``content``. Returns
    a new dataset of the datasets library.

    The keys ``from`` and ``value`` of the ShareGPT format are renamed. Messages that already have
    role and content stay unchanged. If ``column`` is None, the first existing column of
    ``conversations``, ``messages`` and ``prompt`` is used.
    """
    candidates = [column] if column else ["conversations", "messages", "prompt"]
    chat_column = next((name for name in candidates if name in dataset.column_names), None)
    if chat_column is None:
        raise ConfigValueError(
            f"the dataset has no column {' or '.join(candidates)}. Its columns are "
            f"{', '.join(dataset.column_names)}",
            where="standardize_data_formats",
            fix="pass the name of the column with the chats as column=...",
        )
    return dataset.map(
        lambda row: {chat_column: [_convert_message(turn) for turn in row[chat_column]]}
    )


def _convert_message(turn: Mapping[str, Any]) -> dict[str, Any]:
    role = turn.get("role") or turn.get("from")
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    if role is None or content is None:
        raise ConfigValueError(
            f"a message of a chat has the keys {', '.join(map(str, turn))}, but must have role and "
            "content, or from and value",
            where="standardize_data_formats",
            fix="rename the keys of the messages to role and content",
        )
    return {"role": SHAREGPT_ROLES.get(str(role), str(role)), "content": content}


def train_on_responses_only(trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """Raise UnsupportedError. In Unsloth, this function masks the loss of supervised fine-tuning.
    Here it is not supported, because options of TRL's SFTConfig do the same.
    """
    del trainer, args, kwargs
    raise UnsupportedError(
        "train_on_responses_only is not supported, because TRL itself can mask the loss of "
        "supervised fine-tuning",
        where="train_on_responses_only",
        fix="pass SFTConfig(assistant_only_loss=True) or SFTConfig(completion_only_loss=True)",
    )


def _refuse_extras(mapping: Mapping[str, str] | None, system_message: str | None) -> None:
    renamed_keys = {
        name: value for name, value in (mapping or {}).items() if name in ("role", "content")
    }
    if any(name != value for name, value in renamed_keys.items()):
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
