"""A run takes the chat format from its checkpoint. Checkpoints of versions without ``dataset.chat``
are also tested.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from toolkit.base.errors import ConfigError
from toolkit.config.resolved import Situation, resolve_run
from toolkit.config.run_config import DatasetSection, ModelSection, RunConfig
from toolkit.train.data import chat_record

if TYPE_CHECKING:
    from pathlib import Path

CHAT = {"prompt": [{"role": "user", "content": "x"}]}


def config(**dataset: Any) -> RunConfig:
    return RunConfig(model=ModelSection(model_name="m"), dataset=DatasetSection(**dataset))


def write_checkpoint(
    folder: Path, recorded: dict[str, Any], completion: dict[str, Any] | None
) -> Path:
    found = folder / "checkpoint-1"
    found.mkdir()
    (found / "state.json").write_text(json.dumps({"run": recorded}))
    if completion is not None:
        (folder / "completions.jsonl").write_text(json.dumps(completion) + "\n")
    return found


@pytest.mark.parametrize(
    ("recorded", "completion", "kept"),
    [
        ({"dataset.chat": False}, CHAT, False),
        ({"dataset.chat": True}, None, True),
        ({}, CHAT, True),
        ({"dataset.system": "s"}, {"prompt": "s\n\nx"}, False),
        ({}, {"prompt": "x"}, False),
        ({"dataset.system": None}, None, False),
        ({"dataset.system": "s"}, None, "auto"),  # the format is unknown
    ],
)
def test_a_run_resumes_with_the_chat_format_of_its_checkpoint(
    tmp_path: Path, recorded: dict[str, Any], completion: dict[str, Any] | None, kept: bool | str
) -> None:
    found = write_checkpoint(tmp_path, recorded, completion)
    assert chat_record.with_recorded(config(), found).dataset.chat == kept
    assert chat_record.with_chat_key(recorded, found)[chat_record.CHAT_KEY] == (
        None if kept == "auto" else kept
    )
    # The value of the run file is kept.
    assert chat_record.with_recorded(config(chat=True), found).dataset.chat is True


def resolve_config(given_config: RunConfig, template: bool | None) -> RunConfig:
    return resolve_run(given_config, Situation(), has_template=template).config


def test_the_resolved_chat_format_is_recorded() -> None:
    resolved = resolve_config(config(), True)
    assert resolved.dataset.chat is True
    assert chat_record.config_to_record(config(), resolved).dataset.chat is True
    assert resolve_config(config(), None).dataset.chat == "auto"
    assert resolve_config(config(), False).dataset.chat is False
    assert resolve_config(config(chat=False), True).dataset.chat is False


def test_chats_without_a_template_are_refused() -> None:
    text = "the tokenizer of m has no chat template, but dataset.chat is true"
    with pytest.raises(ConfigError, match=text):
        resolve_config(replace(config(chat=True)), False)
