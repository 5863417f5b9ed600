"""``toolkit train`` replaces an auto micro-batch, records the value, and keeps it when the run
resumes.
"""

from __future__ import annotations

import json

import pytest
import train_world as world

BATCH_LINE = "  per_device_train_batch_size: 8\n"
SPLIT_LINES = """\
  per_device_train_batch_size: {}
  gradient_accumulation_steps: {}
  generation_batch_size: 16
"""


def batch_split(run_dir):
    """The micro-batch and the gradient accumulation steps in config.json."""
    grpo = json.loads((run_dir / "config.json").read_text())["grpo"]
    return grpo["per_device_train_batch_size"], grpo["gradient_accumulation_steps"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run file with auto, and the result of its training command."""
    run_file = world.make_run_files(tmp_path_factory.mktemp("w"), steps=2)
    run_file.write_text(
        run_file.read_text().replace(BATCH_LINE, SPLIT_LINES.format("auto", "auto"))
    )
    return run_file, world.run_toolkit("train", run_file)


def test_auto_is_filled_and_recorded(trained):
    run_file, result = trained
    run_dir = run_file.parent / "run"
    assert result.returncode == 0, result.stderr
    assert batch_split(run_dir) == (16, 1)
    config = json.loads((run_dir / "config.json").read_text())
    assert config["lora"]["target_modules"][0] == "q_proj"  # this key was auto too
    assert "auto" not in json.dumps([config["lora"], config["grpo"]])
    assert not (run_dir / "memory.json").exists()  # it is written for GPUs only


@pytest.mark.slow
def test_a_resumed_run_keeps_its_batch_split(trained, tmp_path):
    """The run starts with 4 x 4, as on a smaller GPU. Sizing on this machine chooses 16 x 1."""
    run_file = world.make_run_files(tmp_path, steps=2)
    began = run_file.read_text()
    run_file.write_text(began.replace(BATCH_LINE, SPLIT_LINES.format(4, 4)))
    result = world.run_toolkit("train", run_file)
    assert result.returncode == 0, result.stderr
    left_open = began.replace(BATCH_LINE, SPLIT_LINES.format("auto", "auto"))
    run_file.write_text(left_open.replace("max_steps: 2", "max_steps: 4"))
    allowed = 'runtime.allow_changed=["grpo.max_steps"]'
    result = world.run_toolkit("train", run_file, "--set", allowed)
    assert result.returncode == 0, result.stderr
    assert "checkpoint-2" in result.stdout
    rows = world.read_rows(tmp_path / "run")
    assert rows[-1]["step"] == 4
    assert batch_split(tmp_path / "run") == (4, 4)
    # The batch split does not change the completions, and the gradients only by rounding.
    at_once = world.read_rows(trained[0].parent / "run")[0]
    assert at_once["reward"] == rows[0]["reward"]
    assert at_once["grad_norm"] == pytest.approx(rows[0]["grad_norm"], rel=1e-4)


def test_an_impossible_auto_is_an_error(tmp_path):
    run_file = world.make_run_files(tmp_path)
    run_file.write_text(
        run_file.read_text().replace(BATCH_LINE, "  per_device_train_batch_size: auto\n")
    )
    result = world.run_toolkit("train", run_file)
    assert result.returncode == 1
    assert "GRPO028" in result.stdout + result.stderr
    assert not (tmp_path / "run").exists()
