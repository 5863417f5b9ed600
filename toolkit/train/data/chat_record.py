"""Ensure that a run that is resumed, or used for generation, formats its prompts as in training: as
chats or as plain texts.

A checkpoint and config.json record ``dataset.chat`` as true or false. Older versions of the toolkit
did not have this key. In these versions, a text became a chat only if ``dataset.system`` was set
and the tokenizer had a chat template. For a run of an older version, the first completion in its
log shows the format.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from toolkit.base import files
from toolkit.base.errors import InputError
from toolkit.train.checkpointing import checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from toolkit.config.run_config import RunConfig

CHAT_KEY = "dataset.chat"


def with_recorded(config: RunConfig, checkpoint_dir: Path | None) -> RunConfig:
    """If ``dataset.chat`` is "auto", return ``config`` with the chat format that the checkpoint
    ``checkpoint_dir`` records. Otherwise return ``config`` unchanged.
    """
    if checkpoint_dir is None or config.dataset.chat != "auto":
        return config
    recorded = with_chat_key(
        checkpoint.read_state_value(checkpoint_dir, "run", dict), checkpoint_dir
    )
    return config if recorded[CHAT_KEY] is None else _replace_chat(config, recorded[CHAT_KEY])


def config_to_record(config: RunConfig, resolved: RunConfig) -> RunConfig:
    """Return the config that a checkpoint records. It has the values of ``config``, as the user
    wrote them. Only ``dataset.chat`` is taken from ``resolved``, where "auto" is already replaced
    by true or false.
    """
    return _replace_chat(config, resolved.dataset.chat)


def with_chat_key(recorded: Mapping[str, Any], checkpoint_dir: Path) -> dict[str, Any]:
    """Return the config values that the checkpoint ``checkpoint_dir`` recorded (``recorded``). If
    they have no value for ``dataset.chat``, add one.

    Checkpoints of older versions have no such value. It is then read from the first completion in
    the log of the run: true if the prompt is a chat, else false. If the log has no completion, the
    value is None (unknown) if ``dataset.system`` was set, else false.
    """
    if recorded.get(CHAT_KEY) is not None:
        return dict(recorded)
    used_chats = run_used_chats(checkpoint_dir.parent)
    if used_chats is None:
        used_chats = None if recorded.get("dataset.system") else False
    return {**recorded, CHAT_KEY: used_chats}


def run_used_chats(run_dir: Path) -> bool | None:
    """Whether the prompts of a run were chats, according to the first completion in its log. None
    if the log has no completion.
    """
    try:
        with files.open_bytes(run_dir / "completions.jsonl") as file:
            return isinstance(json.loads(file.readline(files.MAX_JSON_BYTES // 4))["prompt"], list)
    except (InputError, OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _replace_chat(config: RunConfig, chat: Any) -> RunConfig:
    return replace(config, dataset=replace(config.dataset, chat=chat))
