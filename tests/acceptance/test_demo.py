"""``toolkit demo`` as a user calls it: GRPO improves the additions of a small model."""

from __future__ import annotations

import json
import re
from statistics import mean

import pytest
import train_world as world

from toolkit.engine.rollout_engine import vllm_available

pytestmark = pytest.mark.thorough

LAST = re.compile(r"exact match (\d\.\d\d) -> (\d\.\d\d) on 500 held-out problems, (\d+) s")


def run_demo(folder, *arguments):
    result = world.run_toolkit("demo", "--out", folder, *arguments, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    last_line = LAST.fullmatch(result.stdout.splitlines()[-1])
    assert last_line, result.stdout
    return result, float(last_line[1]), float(last_line[2])


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(folder, completed process, exact match before, exact match after) of the demo."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    return folder, *run_demo(folder)


def test_the_demo_learns_and_prints_the_paths_of_its_files(demo):
    folder, result, before, after = demo
    assert before <= 0.6
    assert after >= 0.9
    evaluation = json.loads((folder / "run" / "evaluation.json").read_text())
    assert evaluation["before"]["count"] == evaluation["after"]["count"] == 500
    assert f"{evaluation['after']['rewards']['exact_match']:.2f}" == f"{after:.2f}"
    for command in ("check --config", "size", "validate"):
        assert f"$ envcheck {command} {folder / 'run.yaml'}" in result.stdout
    assert f"$ toolkit train {folder / 'run.yaml'} --evaluate" in result.stdout
    for name in (
        "model/config.json",
        "train.jsonl",
        "eval.jsonl",
        "run/adapter",
        "run/report.html",
    ):
        assert (folder / name).exists(), name
    peak = max(row["peak_memory_bytes"] for row in world.read_rows(folder / "run", "timings.jsonl"))
    assert peak < 2e9
    asked = {row["question"] for row in world.read_rows(folder, "train.jsonl")}
    held_out = {row["question"] for row in world.read_rows(folder, "eval.jsonl")}
    assert len(held_out) == 500
    assert not asked & held_out


@pytest.mark.slow
@pytest.mark.skipif(not vllm_available(), reason="needs vLLM")  # only the subprocess imports vLLM
def test_the_demo_trains_on_vllm_as_on_transformers(demo, tmp_path):
    """The run file and the seed are the same. vLLM samples other completions, but the reward rises
    equally. The run ends after 16 steps, because a whole run is slow.
    """
    folder = demo[0]
    steps = 16
    changed = {"runtime.engine": "vllm", "runtime.output_dir": tmp_path / "run"}
    changes = [f"--set={key}={value}" for key, value in changed.items()]
    result = world.run_toolkit(
        "train", folder / "run.yaml", *changes, f"--set=grpo.max_steps={steps}"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    theirs, ours = (
        [row["reward"] for row in world.read_rows(run, "metrics.jsonl") if "reward" in row]
        for run in (folder / "run", tmp_path / "run")
    )
    assert len(ours) == steps
    assert ours[0] == pytest.approx(theirs[0], abs=0.1)
    late = mean(ours[-5:])
    assert late > mean(ours[:3]) + 0.1
    assert late == pytest.approx(mean(theirs[steps - 5 : steps]), abs=0.1)


@pytest.mark.slow
@pytest.mark.engine
def test_the_demo_learns_on_vllm(tmp_path):
    pytest.importorskip("vllm")
    _, before, after = run_demo(tmp_path / "demo", "--engine", "vllm")
    assert before <= 0.6
    assert after >= 0.9


def test_a_folder_that_is_not_empty_is_an_error_before_anything_is_written(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    result = world.run_toolkit("demo", "--out", tmp_path)
    assert result.returncode == 1
    assert "is not an empty folder" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
