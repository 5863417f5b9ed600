"""``toolkit demo`` as it is typed: from nothing to a model that adds better than it was taught."""

from __future__ import annotations

import json
import re

import pytest
import train_world as world

LAST = re.compile(r"exact match (\d\.\d\d) -> (\d\.\d\d) on 500 held-out problems, (\d+) s")


def run_demo(folder, *arguments):
    done = world.toolkit("demo", "--out", folder, *arguments, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    found = LAST.fullmatch(done.stdout.splitlines()[-1])
    assert found, done.stdout
    return done, float(found[1]), float(found[2])


def test_the_demo_learns_and_shows_where_everything_lies(tmp_path):
    folder = tmp_path / "demo"
    done, before, after = run_demo(folder)
    assert before <= 0.6
    assert after >= 0.9
    said = json.loads((folder / "run" / "evaluation.json").read_text())
    assert said["before"]["count"] == said["after"]["count"] == 500
    assert f"{said['after']['rewards']['exact_match']:.2f}" == f"{after:.2f}"
    for command in ("check --config", "size", "validate"):
        assert f"$ envcheck {command} {folder / 'run.yaml'}" in done.stdout
    assert f"$ toolkit train {folder / 'run.yaml'} --evaluate" in done.stdout
    for name in (
        "model/config.json",
        "train.jsonl",
        "eval.jsonl",
        "run/adapter",
        "run/report.html",
    ):
        assert (folder / name).exists(), name
    peak = max(row["peak_memory_bytes"] for row in world.rows(folder / "run", "timings.jsonl"))
    assert peak < 2e9
    asked = {row["question"] for row in world.rows(folder, "train.jsonl")}
    held_out = {row["question"] for row in world.rows(folder, "eval.jsonl")}
    assert len(held_out) == 500
    assert not asked & held_out


@pytest.mark.slow
@pytest.mark.engine
def test_the_demo_learns_on_vllm_too(tmp_path):
    pytest.importorskip("vllm")
    _, before, after = run_demo(tmp_path / "demo", "--engine", "vllm")
    assert before <= 0.6
    assert after >= 0.9


def test_a_folder_with_something_in_it_is_refused_before_anything_is_made(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    done = world.toolkit("demo", "--out", tmp_path)
    assert done.returncode == 1
    assert "is not an empty folder" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
