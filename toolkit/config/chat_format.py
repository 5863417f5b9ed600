"""Resolve ``dataset.chat``, which says whether plain text prompts become user messages.

"auto" means true if the tokenizer has a chat template, because a model with a chat template was
trained on chats. If the prompt column contains lists of messages, they are always treated as chats.
The meaning of "auto" does not depend on ``dataset.system``. If prompts stay plain text, the system
text is put before each prompt.

The function ``is_usable_template`` decides whether a chat template can be used, both for the files
of a tokenizer and for a loaded tokenizer.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.base.errors import ConfigError
from toolkit.base.hub_cache import cached_model

if TYPE_CHECKING:
    from toolkit.config.run_config import RunConfig

TEMPLATE_FILE = "chat_template.jinja"
ADDITIONAL_TEMPLATES = "additional_chat_templates"
TOKENIZER_CONFIG = "tokenizer_config.json"
_OTHER_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")

NO_TEMPLATE = "the tokenizer of {model} has no chat template, but dataset.chat is true"
NO_TEMPLATE_FIX = "set dataset.chat: false, or use a model with a chat template (an instruct model)"
NOT_CHATS = "column {column} contains lists of chat messages, but dataset.chat is false"
NOT_CHATS_FIX = "set dataset.chat: auto, or name a column of plain text in dataset.prompt"
CHATS_WITHOUT_TEMPLATE = "column {column} contains chats, but the tokenizer has no chat template"
UNREADABLE_TOOL_CALLS_FIX = (
    "use a model with a chat template whose tool calls TRL can read, such as Qwen3, or set "
    "response_template in the model's tokenizer_config.json, or remove the tools section"
)
CHATS_WITHOUT_TEMPLATE_FIX = (
    "use plain text prompts, or use a model with a chat template (an instruct model)"
)


def is_usable_template(template: Any) -> bool:
    """Whether chats can be rendered with ``template``, the ``chat_template`` of a loaded tokenizer
    or of tokenizer_config.json. Chats can be rendered with a single template, and with a collection
    of templates if one of them is named "default".
    """
    if isinstance(template, str):
        return bool(template)
    if isinstance(template, dict):
        return bool(template.get("default"))
    if isinstance(template, (list, tuple)):
        templates = [item for item in template if isinstance(item, dict)]
        return any(
            item.get("name") == "default" and bool(item.get("template")) for item in templates
        )
    return False


def folder_has_template(folder: Path) -> bool | None:
    """Whether the tokenizer in ``folder`` has a chat template; None if the folder contains no
    tokenizer. The files are read in the order in which transformers 5.17 reads them.
    """
    from toolkit.config.model_facts import read_json  # noqa: PLC0415 - only when a rule asks

    templates = {
        path.stem: path
        for path in _list_files(folder / ADDITIONAL_TEMPLATES)
        if path.suffix == ".jinja"
    }
    main = folder / TEMPLATE_FILE
    if main.is_file():
        templates.setdefault("default", main)
    if templates:  # template files replace the template in tokenizer_config.json
        return "default" in templates and _is_nonempty_file(templates["default"])
    config = read_json(folder / TOKENIZER_CONFIG)
    if isinstance(config, dict):
        return is_usable_template(config.get("chat_template"))
    has_tokenizer = any((folder / name).is_file() for name in _OTHER_TOKENIZER_FILES)
    return False if has_tokenizer else None


def model_has_template(model_name: str, revision: str | None = None) -> bool | None:
    """Whether the tokenizer of a model has a chat template; None if the model is not on this
    machine. ``model_name`` is a model folder or a hub id. A hub id is looked up in the hub cache,
    and nothing is downloaded.
    """
    folder = Path(model_name)
    if not (folder / "config.json").is_file():
        cached = cached_model(model_name, revision, os.environ)
        if cached is None:
            return None
        folder = cached
    return folder_has_template(folder)


def resolve_chat(chat: bool | str, has_template: bool | None) -> bool | None:
    """Return ``chat``, the value of ``dataset.chat``. If it is "auto", return ``has_template``
    instead.

    ``has_template`` says whether the tokenizer has a chat template. It is None if the tokenizer is
    not available.
    """
    return chat if isinstance(chat, bool) else has_template


def check_chat_template(config: RunConfig, has_template: bool | None) -> None:
    """Raise ConfigError if ``dataset.chat`` is true and the tokenizer has no chat template."""
    if config.dataset.chat is True and has_template is False:
        raise ConfigError(
            NO_TEMPLATE.format(model=config.model.model_name),
            where=config.source or "dataset.chat",
            fix=NO_TEMPLATE_FIX,
        )


def _list_files(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_file()]
    except OSError:
        return []


def _is_nonempty_file(path: Path) -> bool:
    """Whether a file exists and is not empty. The file is not opened."""
    try:
        return path.is_file() and path.stat().st_size > 0
    except OSError:
        return False
