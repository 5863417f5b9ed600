"""Runs whose prompts and rewards come from an environment (reasoning-gym, verifiers, OpenEnv)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from spoiled_world import make_model, make_world, run_commands

pytest.importorskip("reasoning_gym")
pytestmark = pytest.mark.slow
ENVIRONMENT = {"adapter": "reasoning_gym", "task": "leg_counting", "size": 12, "eval_size": 2}


def test_a_run_on_the_tasks_of_reasoning_gym(tmp_path: Path) -> None:
    """The run trains to its end. With another ``environment.seed``, it cannot be resumed."""
    folder = make_world(
        tmp_path / "world",
        make_model(tmp_path),
        model={"max_seq_length": 256},
        grpo={"max_prompt_length": 200, "save_steps": 1},
        runtime={"allow_code": ["reasoning_gym"]},
    )
    run_file = folder / "run.yaml"
    run = json.loads(run_file.read_text())
    del run["dataset"], run["reward"]
    run["environment"] = ENVIRONMENT
    run_file.write_text(json.dumps(run))
    (folder / "train.jsonl").unlink()

    (ended,) = run_commands([{"folder": folder, "arguments": ["train", "run.yaml"]}])
    assert ended.returncode == 0, ended.stderr
    assert "12 plain prompts from reasoning_gym:leg_counting" in ended.stdout
    rows = ended.rows()
    assert [row["step"] for row in rows if "rewards/reasoning_gym/mean" in row] == [1, 2]
    prompts = [row["prompt"] for row in ended.rows("completions.jsonl")]
    assert all("legs" in prompt for prompt in prompts)
    config = json.loads((folder / "out" / "config.json").read_text())
    assert config["environment"]["task"] == "leg_counting"

    run["environment"] = {**ENVIRONMENT, "seed": 1}
    run_file.write_text(json.dumps(run))
    run["grpo"]["max_steps"] = 3
    (refused,) = run_commands([{"folder": folder, "arguments": ["train", "run.yaml"]}])
    assert refused.returncode == 1
    assert "environment.seed" in refused.stderr


def test_a_run_on_the_tasks_of_verifiers(tmp_path: Path) -> None:
    """The taskset is a module next to the run file. The run trains on its first 8 tasks and
    evaluates on the next 2.
    """
    pytest.importorskip("verifiers.v1")
    taskset = Path(__file__).parents[1] / "unit" / "train" / "environments" / "sums_taskset.py"
    folder = make_world(
        tmp_path / "world",
        make_model(tmp_path),
        runtime={"allow_code": ["verifiers", "sums_taskset"]},
    )
    (folder / "sums_taskset.py").write_text(taskset.read_text())
    run_file = folder / "run.yaml"
    run = json.loads(run_file.read_text())
    del run["dataset"], run["reward"]
    options = {"most": 12}
    run["environment"] = {
        "adapter": "verifiers", "task": "sums-taskset", "size": 8, "eval_size": 2,
        "options": options,
    }  # fmt: skip
    run_file.write_text(json.dumps(run))
    (ended,) = run_commands([{"folder": folder, "arguments": ["train", "run.yaml"]}])
    assert ended.returncode == 0, ended.stderr
    assert "8 plain prompts from verifiers:sums-taskset" in ended.stdout
    rows = [row for row in ended.rows() if "rewards/verifiers/mean" in row]
    assert [row["step"] for row in rows] == [1, 2]
    evaluation = json.loads((folder / "out" / "evaluation.json").read_text())
    assert evaluation["after"]


def test_a_missing_package_is_an_error_before_the_start(tmp_path: Path) -> None:
    """``check`` and ``train`` print the command that installs the package. In validate, a missing
    package is finding ENV005.
    """
    from spoiled_world import ENVCHECK

    folder = make_world(tmp_path / "world", make_model(tmp_path))
    python = folder / "venv" / "bin" / "python"
    (folder / "venv" / "lib" / "python3.11" / "site-packages").mkdir(parents=True)
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    run_file = folder / "run.yaml"
    run = json.loads(run_file.read_text())
    del run["dataset"], run["reward"]
    run["environment"] = {"adapter": "openenv", "task": "game:Game", "python": "venv/bin/python"}
    run["runtime"]["allow_code"] = ["openenv", "game"]
    run_file.write_text(json.dumps(run))
    line = f"{python} -m pip install 'openenv>=0.10'"
    words = [ENVCHECK, "check", "--config", "run.yaml", "--json"]
    checked = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert checked.returncode == 1, checked.stdout
    assert line in checked.stdout
    (ended,) = run_commands([{"folder": folder, "arguments": ["train", "run.yaml"]}])
    assert ended.returncode == 1
    assert line in ended.stderr
    assert "environment.adapter" in ended.stderr


@pytest.mark.parametrize(
    ("adapter", "task", "message"),
    [
        ("verifiers", "no-such-taskset", "environment.task: verifiers has no taskset no-such-"),
        ("verifiers", "mine", "mine.py does not define __all__"),
        ("reasoning_gym", "leg_countin", "has no task leg_countin"),
        ("reasoning_gym", "leg_counting", "does not contain 1 tensors"),
    ],
)
def test_a_missing_task_is_an_error_before_the_model_is_loaded(
    tmp_path: Path, adapter: str, task: str, message: str
) -> None:
    """A tensor of the model is renamed, so a run with a valid task fails when the model loads."""
    pytest.importorskip(adapter)
    model = make_model(tmp_path)
    folder = make_world(tmp_path / "world", model)
    run_file = folder / "run.yaml"
    run = json.loads(run_file.read_text())
    del run["dataset"], run["reward"]
    run["environment"] = {"adapter": adapter, "task": task, "size": 4}
    run["runtime"]["allow_code"] = [adapter, task.replace("-", "_")]
    run_file.write_text(json.dumps(run))
    for weights in model.glob("*.safetensors"):
        weights.write_bytes(weights.read_bytes().replace(b"model.norm.", b"model.nrom."))
    (ended,) = run_commands([{"folder": folder, "arguments": ["train", "run.yaml"]}])
    assert message in ended.stderr
    good = task == "leg_counting"
    assert ended.returncode == (2 if good else 1), ended.stderr
    assert ("environment.task" in ended.stderr) is not good
