"""Faults during a run of ``toolkit train``: out of memory, NaN losses, and reward functions that
hang or return invalid values. The tests check the exit code, the message and the remaining files.

The run's reward module, which the run file allows, causes the fault. It is imported after all other
modules, so it can replace functions to simulate a GPU that is too small or a NaN loss.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.numpy import load_file
from spoiled_world import FinishedCommand, make_model, make_world, run_commands

from toolkit.train.checkpointing.trainer_state import ADAPTER_FILE

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.thorough

SCORE = """
import time
import torch
from transformers import LlamaForCausalLM
from toolkit.train.trainer import GRPOTrainer

def score(completions, trainer_state, **kwargs):
    return [float(len(set(text))) for text in completions]
"""
NARROW = """
losses = GRPOTrainer._compute_loss

def narrow(self, model, inputs):
    if (inputs["advantages"] != 0).sum() > LIMIT:  # rows that the forward computes
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return losses(self, model, inputs)

GRPOTrainer._compute_loss = narrow
"""
NARROW_ROLLOUT = """
sample = LlamaForCausalLM.generate

def narrow(self, input_ids=None, *args, **kwargs):
    rows = kwargs["input_ids"] if input_ids is None else input_ids
    if rows.shape[0] > LIMIT:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return sample(self, rows, *args, **kwargs)

LlamaForCausalLM.generate = narrow
"""
NOT_A_NUMBER = """
losses = GRPOTrainer._compute_loss

def broken(self, model, inputs):
    loss = losses(self, model, inputs)
    return loss * float("nan") if self.state.global_step in STEPS else loss

GRPOTrainer._compute_loss = broken
"""
HANGS = """
import time

def score(completions, trainer_state, **kwargs):
    if trainer_state.global_step == 1:
        time.sleep(600)
    return [1.0] * len(completions)
"""
NONSENSE = """
def score(completions, trainer_state, **kwargs):
    return [1.0] * 3 + [RETURNED if trainer_state.global_step == 1 else 0.0]
"""
DEFECT = """
def broken(self, model, inputs):
    raise KeyError("hf_" + "a" * 24)

GRPOTrainer._compute_loss = broken
"""
SECRET = "not-to-be-told-to-anyone"
CASES: dict[str, str] = {
    "undisturbed": SCORE,
    "small card": SCORE + NARROW.replace("LIMIT", "2"),
    "tiny card": SCORE + NARROW.replace("LIMIT", "0"),
    "small card in the rollout": SCORE + NARROW_ROLLOUT.replace("LIMIT", "1"),
    "tiny card in the rollout": SCORE + NARROW_ROLLOUT.replace("LIMIT", "0"),
    "one bad step": SCORE + NOT_A_NUMBER.replace("STEPS", "(1,)"),
    "bad steps": SCORE + NOT_A_NUMBER.replace("STEPS", "range(1, 100)"),
    "hangs": HANGS,
    "returns infinity": NONSENSE.replace("RETURNED", "float('inf')"),
    "returns a text": NONSENSE.replace("RETURNED", "'high'"),
    "defect": SCORE + DEFECT,
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FinishedCommand]:
    """The results of all cases."""
    root = tmp_path_factory.mktemp("faults")
    model, cases = make_model(root), []
    for name, module in CASES.items():
        folder = make_world(
            root / name.replace(" ", "-"),
            model,
            grpo={"max_steps": 4, "save_steps": 1, "learning_rate": 1e-2},
            # A module that patches the trainer must be imported in the trainer's process.
            reward={"timeout_s": 1.0, "isolate": not module.startswith(SCORE)},
        )
        (folder / "mine.py").write_text(module)
        env = {"WANDB_API_KEY": SECRET}
        arguments = ["train", "run.yaml", "--set", f"grpo.run_name={SECRET}"]
        cases.append({"folder": folder, "arguments": arguments, "env": env})
    return dict(zip(CASES, run_commands(cases), strict=True))


def rows(run: FinishedCommand, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "out" / name).read_text().splitlines()]


def checkpoints(run: FinishedCommand) -> list[str]:
    return sorted(path.name for path in (run.folder / "out").glob("checkpoint-*"))


def adapter(folder: Path) -> dict[str, Any]:
    return load_file(folder / "out" / "adapter" / "adapter_model.safetensors")


def check_refused(run: FinishedCommand, *messages: str) -> None:
    """Check that the run ended with exit code 1 and one error message, which has a fix."""
    assert run.returncode == 1, run.stderr
    assert "Traceback" not in run.stdout + run.stderr
    assert sum(line.startswith("error: ") for line in run.stderr.splitlines()) == 1
    assert "  fix: " in run.stderr
    for message in messages:
        assert message in run.stderr


def test_out_of_memory_in_a_step_loses_no_step(results) -> None:
    run, whole = results["small card"], results["undisturbed"]
    assert run.returncode == whole.returncode == 0, run.stderr
    assert run.stderr.splitlines() == [
        "warning: training step: out of memory, the micro-batch is split into 2 parts from now on"
        " (CUDA out of memory. Tried to allocate 2.00 GiB)"
    ]
    assert whole.stderr == ""
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4]
    expected = adapter(whole.folder)
    for name, value in adapter(run.folder).items():
        assert value == pytest.approx(expected[name], abs=2e-4), name  # Adam amplifies rounding


def test_memory_that_is_too_small_for_a_sequence_is_an_error(results) -> None:
    what = "out of memory, even with the micro-batch split into the smallest parts"
    check_refused(results["tiny card"], what, "per_device_train_batch")
    assert checkpoints(results["tiny card"]) == []


def test_out_of_memory_in_a_rollout_loses_no_completion(results) -> None:
    run = results["small card in the rollout"]
    assert run.returncode == 0, run.stderr
    messages = [line.partition(" (")[0] for line in run.stderr.splitlines()]
    assert messages == [  # one warning per reduction, not per step
        "warning: rollout: out of memory with 4 sequences. From now on at most 2 run at a time",
        "warning: rollout: out of memory with 2 sequences. From now on at most 1 run at a time",
    ]
    assert [len(rows(run)), len(rows(run, "completions.jsonl"))] == [4, 16]
    check_refused(results["tiny card in the rollout"], "out of memory")


def test_a_step_with_a_nan_loss_is_skipped_and_counted(results) -> None:
    run = results["one bad step"]
    assert run.returncode == 0, run.stderr
    assert run.stderr.splitlines() == [
        "warning: step 2 skipped: loss or gradient is not finite (1 in a row)"
    ]
    assert [row.get("skipped") for row in rows(run)] == [None, 1.0, None, None]
    assert [row["loss"] is None for row in rows(run)] == [False, True, False, False]
    assert sum("skipped: not finite" in line for line in run.stdout.splitlines()) == 1


def test_several_steps_with_a_nan_loss_stop_the_run_and_save_the_batch(results) -> None:
    run = results["bad steps"]
    saved = run.folder / "out" / "bad-step-4-rank-0.safetensors"
    check_refused(
        run, "not finite for 3 steps in a row, up to step 4", str(saved), "weights from before"
    )
    assert load_file(saved)
    assert checkpoints(run) == ["checkpoint-2", "checkpoint-3"]
    first, last = (run.folder / "out" / name / ADAPTER_FILE for name in checkpoints(run))
    assert first.read_bytes() == last.read_bytes()


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        ("hangs", ("reward score took longer than 1 s", "or raise reward.timeout_s")),
        ("returns infinity", ("reward score returned inf", "fix the function, or")),
        ("returns a text", ("reward score returned a str", "fix the function, or")),
    ],
)
def test_a_failing_reward_ends_the_run_and_saves_its_sample(results, name, messages) -> None:
    run = results[name]
    check_refused(run, *messages, "bad_rewards.jsonl", "reward.on_error: none")
    (record,) = rows(run, "bad_rewards.jsonl")
    assert record["reward"] == "score"
    assert checkpoints(run) == ["checkpoint-1"]


def test_a_defect_ends_with_70_and_a_report_to_send(results) -> None:
    run = results["defect"]
    assert run.returncode == 70
    assert "Traceback" not in run.stdout + run.stderr
    (report,) = (run.folder / "out").glob("toolkit-defect-*.txt")
    lines = run.stderr.splitlines()
    assert lines[-3].startswith("internal error: KeyError: ")
    assert lines[-2] == f"  this is a defect of the toolkit; the report is in {report}"
    assert "attach that file to an issue" in lines[-1]
    text = report.read_text()
    for words in ("Traceback", "_compute_loss", "transformers 5.", "torch ", '"max_steps": 4'):
        assert words in text
    for secret in (SECRET, "hf_" + "a" * 24):
        assert secret not in text + run.stderr
    assert "toolkit train run.yaml --set" in text
