"""``envcheck validate`` reports an environment task that does not exist, and executes no code."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from toolkit.cli.validate import validate

if TYPE_CHECKING:
    from pathlib import Path

REGISTERED = """
raise RuntimeError("validation must not run this")
DATASET_NAME = "leg_counting"
register_dataset(DATASET_NAME, A, B)
register_dataset(
    "composite", A, B
)
"""


def interpreter(folder: Path) -> Path:
    """The Python of a virtual environment with a fake reasoning_gym (two tasks) and a fake
    verifiers (one taskset).
    """
    packages = folder / "venv" / "lib" / "python3.11" / "site-packages"
    (packages / "reasoning_gym" / "games").mkdir(parents=True)
    (packages / "reasoning_gym" / "games" / "legs.py").write_text(REGISTERED)
    built_in = packages / "verifiers" / "v1" / "tasksets"
    built_in.mkdir(parents=True)
    for package in (built_in, built_in.parent, built_in.parent.parent):
        (package / "__init__.py").touch()
    (built_in / "shipped.py").touch()
    python = folder / "venv" / "bin" / "python"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    return python


def findings(folder: Path, *options: str, **environment: str) -> tuple[int, list[dict[str, Any]]]:
    run = {
        "model": {"model_name": "m/m"},
        "environment": environment,
        "runtime": {"allow_code": ["reasoning_gym", "verifiers", "openenv", "mine", "nowhere"]},
    }
    (folder / "run.json").write_text(json.dumps(run))
    command = [str(folder / "run.json"), "--format", "json", *options]
    outcome = CliRunner().invoke(validate, command)
    assert outcome.exception is None or isinstance(outcome.exception, SystemExit), outcome.exc_info
    told = json.loads(outcome.stdout)["findings"]
    return outcome.exit_code, [one for one in told if one["rule"] == "ENV009"]


@pytest.mark.parametrize(
    ("adapter", "task", "severity", "message"),
    [
        ("reasoning_gym", "leg_countin", "error", "has no task leg_countin"),
        ("reasoning_gym", "leg_counting", None, ""),
        ("reasoning_gym", "composite", None, ""),
        ("verifiers", "someone/no-where@1.2", None, ""),  # ENV006 reports this task
        ("verifiers", "nowhere", "warning", "module nowhere is neither next to the run file nor"),
        ("verifiers", "mine", "error", "does not define __all__, by which verifiers finds"),
        ("openenv", "mine:Gaem", "error", "does not define Gaem (did you mean Game?)"),
        ("openenv", "mine:Game", None, ""),
        ("openenv", "nowhere:Game", "warning", "module nowhere is neither next to the run file"),
    ],
)
def test_a_task_that_does_not_exist_is_an_error(
    tmp_path: Path, adapter: str, task: str, severity: str | None, message: str
) -> None:
    (tmp_path / "mine.py").write_text("raise RuntimeError('read only')\nclass Game: ...\n")
    python = str(interpreter(tmp_path))
    code, found = findings(tmp_path, adapter=adapter, task=task, python=python)
    assert [one["severity"] for one in found] == ([severity] if severity else [])
    for one in found:
        assert one["key"] == "environment.task"
        assert message in one["message"]
        assert code == (1 if severity == "error" else 0)
    if severity == "warning":
        assert findings(tmp_path, "--strict", adapter=adapter, task=task, python=python)[0] == 5


def test_a_taskset_of_verifiers_is_valid(tmp_path: Path) -> None:
    python = str(interpreter(tmp_path))
    run = {
        "model": {"model_name": "m/m"},
        "environment": {"adapter": "verifiers", "task": "shipped", "python": python},
        "runtime": {"allow_code": ["verifiers", "shipped"]},
    }
    (tmp_path / "run.json").write_text(json.dumps(run))
    outcome = CliRunner().invoke(validate, [str(tmp_path / "run.json"), "--format", "json"])
    assert "ENV009" not in outcome.stdout


def test_a_misspelt_task_is_corrected(tmp_path: Path) -> None:
    """With the installed reasoning_gym: the task of the environment and the task of a reward."""
    pytest.importorskip("reasoning_gym")
    run = {
        "model": {"model_name": "m/m"},
        "environment": {"adapter": "reasoning_gym", "task": "leg_countin"},
        "reward": {
            "functions": [{"name": "reasoning_gym", "options": {"task": "chain_sums"}}],
        },
        "runtime": {"allow_code": ["reasoning_gym"]},
    }
    file = tmp_path / "run.json"
    file.write_text(json.dumps(run))
    outcome = CliRunner().invoke(validate, [str(file), "--format", "json"])
    found = [one for one in json.loads(outcome.stdout)["findings"] if one["rule"] == "ENV009"]
    assert [one["key"] for one in found] == [
        "environment.task",
        "reward.functions[0].options.task",
    ]
    CliRunner().invoke(validate, [str(file), "--fix"])
    fixed = json.loads(file.read_text())
    assert fixed["environment"]["task"] == "leg_counting"
    assert fixed["reward"]["functions"][0]["options"]["task"] == "chain_sum"
