"""An auto micro-batch belongs to the run that began with it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from toolkit.config.run_config import ModelSection, RunConfig
from toolkit.train.checkpointing import micro_batch_record
from toolkit.train.checkpointing.run_directory import fingerprint

if TYPE_CHECKING:
    from pathlib import Path

AUTO = {
    "per_device_train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
    "generation_batch_size": 32,
}


def config(**grpo: Any) -> RunConfig:
    return RunConfig(model=ModelSection(model_name="any"), grpo={**AUTO, **grpo})


def checkpoint(folder: Path, **grpo: Any) -> Path:
    """A checkpoint's state.json, as far as it is read here."""
    written = {f"grpo.{key}": value for key, value in {**AUTO, **grpo}.items()}
    (folder / "state.json").write_text(json.dumps({"run": written}))
    return folder


def cut(config: RunConfig) -> tuple[Any, Any]:
    return tuple(config.grpo[key] for key in micro_batch_record.SPLIT_KEYS)


def test_what_a_checkpoint_was_made_with_stays(tmp_path: Path) -> None:
    found = checkpoint(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=8)
    assert cut(micro_batch_record.with_recorded(config(), found)) == (4, 8)
    assert cut(micro_batch_record.with_recorded(config(), None)) == ("auto", "auto")
    written = config(per_device_train_batch_size=16, gradient_accumulation_steps=2)
    assert micro_batch_record.with_recorded(written, found) is written


@pytest.mark.parametrize(
    "grpo",
    [
        {"generation_batch_size": 64},  # another run: sizing chooses, and the change is told
        {"generation_batch_size": 16},
    ],
)
def test_another_generation_batch_is_not_cut_in_the_old_way(
    tmp_path: Path, grpo: dict[str, int]
) -> None:
    found = checkpoint(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=8)
    assert cut(micro_batch_record.with_recorded(config(**grpo), found)) == ("auto", "auto")


def test_a_checkpoint_without_numbers_leaves_the_choice_open(tmp_path: Path) -> None:
    assert cut(micro_batch_record.with_recorded(config(), checkpoint(tmp_path))) == ("auto", "auto")


def test_what_is_recorded_are_the_numbers() -> None:
    resolved = config(per_device_train_batch_size=8, gradient_accumulation_steps=4)
    assert cut(micro_batch_record.config_to_record(config(), resolved)) == (8, 4)
    assert micro_batch_record.config_to_record(resolved, config()) is resolved


def test_the_tokens_of_a_pass_stay_as_the_checkpoint_has_them(tmp_path: Path) -> None:
    found = checkpoint(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=8)
    # A version before pack_tokens was cut by rows; so is what resumes it.
    assert micro_batch_record.with_recorded(config(), found).runtime.pack_tokens == "auto"
    state = json.loads((tmp_path / "state.json").read_text())
    state["run"]["runtime.pack_tokens"] = 5000
    (tmp_path / "state.json").write_text(json.dumps(state))
    kept = micro_batch_record.with_recorded(config(), found)
    assert kept.runtime.pack_tokens == 5000
    assert fingerprint(kept, {})["runtime.pack_tokens"] == 5000
    assert "runtime.pack_tokens" not in fingerprint(config(), {})
    assert micro_batch_record.config_to_record(config(), kept).runtime.pack_tokens == 5000
    assert micro_batch_record.config_to_record(kept, config()) is kept
