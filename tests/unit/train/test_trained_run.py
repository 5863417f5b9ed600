"""The choice of the adapter or checkpoint that is read from a run folder."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from toolkit.base.errors import ConfigValueError, InputError, UnsupportedError
from toolkit.train.checkpointing import checkpoint
from toolkit.train.checkpointing.trained_run import open_run, trained_on_chats, with_engine

if TYPE_CHECKING:
    from pathlib import Path


def _write_run(folder: Path, *, dataset: dict[str, object] | None = None, **model: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model": {"model_name": "some/model", **model}, "lora": {"r": 4}}
    config["dataset"] = dataset or {}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _write_checkpoint(folder: Path, step: int) -> Path:
    partial = checkpoint.begin(folder, step)
    (partial / "adapter_model.safetensors").write_bytes(b"weights")
    return checkpoint.commit(partial, step)


def test_the_finished_adapter_is_used_first(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "run")
    _write_checkpoint(run, 3)
    (run / "adapter").mkdir()
    (run / "adapter" / "adapter_config.json").write_text("{}")
    assert open_run(run).adapter == run / "adapter"
    assert open_run(run, step=3).checkpoint == run / "checkpoint-3"
    assert open_run(run, step=3).adapter is None


def test_without_an_adapter_the_latest_intact_checkpoint_is_used(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "run")
    for step in (3, 20, 100):
        damaged = _write_checkpoint(run, step)
    (damaged / "adapter_model.safetensors").write_bytes(b"")
    assert open_run(run).checkpoint == run / "checkpoint-20"
    with pytest.raises(ConfigValueError, match="has no intact checkpoint-100"):
        open_run(run, step=100)


def test_a_run_folder_cannot_allow_the_code_of_its_model(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "run", trust_remote_code=True)
    _write_checkpoint(run, 3)
    with pytest.raises(ConfigValueError, match="runs code that comes with some/model") as refused:
        open_run(run)
    assert "--trust-remote-code" in str(refused.value.fix)
    assert open_run(run, trust_remote_code=True).checkpoint == run / "checkpoint-3"


def test_folders_without_a_usable_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not a run folder: config\.json is missing"):
        open_run(tmp_path)
    with pytest.raises(
        ConfigValueError, match="neither an intact checkpoint nor a finished adapter"
    ):
        open_run(_write_run(tmp_path / "run"))
    with pytest.raises(UnsupportedError, match="trained every weight"):
        open_run(_write_run(tmp_path / "full", full_finetuning=True))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="is not the config of a run"):
        open_run(tmp_path)


def test_generation_turns_gradient_checkpointing_off(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "run")
    _write_checkpoint(run, 1)
    config = with_engine(open_run(run).config, "vllm")
    assert config.runtime.engine == "vllm"
    assert config.lora.use_gradient_checkpointing is False
    assert config.lora.r == 4


CHAT = '{"prompt": [{"role": "user", "content": "x"}]}'


@pytest.mark.parametrize(
    ("dataset", "line", "expected"),
    [
        ({"chat": True}, '{"prompt": "x"}', True),  # dataset.chat decides
        ({"chat": False, "system": "s"}, CHAT, False),
        # Versions without dataset.chat: the first completion decides, else the system prompt.
        ({}, CHAT, True),
        ({"system": "s"}, '{"prompt": "x"}', False),
        ({}, "", False),
        ({"system": "s"}, "torn", True),
        ({"system": "s"}, None, True),
        ({}, None, False),
    ],
)
def test_prompts_are_in_the_format_of_the_run(
    tmp_path: Path, dataset: dict[str, object], line: str | None, expected: bool
) -> None:
    run = _write_run(tmp_path / "run", dataset=dataset)
    _write_checkpoint(run, 1)
    if line is not None:
        (run / "completions.jsonl").write_text(line + "\n")
    assert trained_on_chats(open_run(run), has_template=True) is expected
