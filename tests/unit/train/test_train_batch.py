"""A resumed run keeps the micro-batch that was chosen automatically at its start."""

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
    """Write the part of a checkpoint's state.json that the tests read, and return the folder."""
    written = {f"grpo.{key}": value for key, value in {**AUTO, **grpo}.items()}
    (folder / "state.json").write_text(json.dumps({"run": written}))
    return folder


def split_of(config: RunConfig) -> tuple[Any, Any]:
    return tuple(config.grpo[key] for key in micro_batch_record.SPLIT_KEYS)


def test_the_recorded_micro_batch_is_used(tmp_path: Path) -> None:
    found = checkpoint(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=8)
    assert split_of(micro_batch_record.with_recorded(config(), found)) == (4, 8)
    assert split_of(micro_batch_record.with_recorded(config(), None)) == ("auto", "auto")
    written = config(per_device_train_batch_size=16, gradient_accumulation_steps=2)
    assert micro_batch_record.with_recorded(written, found) is written


@pytest.mark.parametrize(
    "grpo",
    [
        # The number of completions per step changed: sizing chooses, and the change is reported.
        {"generation_batch_size": 64},
        {"generation_batch_size": 16},
    ],
)
def test_the_recorded_micro_batch_is_not_used_for_another_generation_batch(
    tmp_path: Path, grpo: dict[str, int]
) -> None:
    found = checkpoint(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=8)
    assert split_of(micro_batch_record.with_recorded(config(**grpo), found)) == ("auto", "auto")


def test_a_checkpoint_without_numbers_leaves_auto_unchanged(tmp_path: Path) -> None:
    assert split_of(micro_batch_record.with_recorded(config(), checkpoint(tmp_path))) == (
        "auto",
        "auto",
    )


def test_the_resolved_numbers_are_recorded() -> None:
    resolved = config(per_device_train_batch_size=8, gradient_accumulation_steps=4)
    assert split_of(micro_batch_record.config_to_record(config(), resolved)) == (8, 4)
    assert micro_batch_record.config_to_record(resolved, config()) is resolved


def test_the_recorded_pack_tokens_are_used(tmp_path: Path) -> None:
    found = checkpoint(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=8)
    # A version without pack_tokens split batches by rows. The resumed run does the same.
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
