"""``toolkit bench`` on the CPU engine: all figures of the toolkit's arm, and the reasons why other
arms cannot run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

SMALL = ["--shape", "tiny", "--steps", "2", "--completion-tokens", "8"]


def _run_bench(folder: Path, *arguments: str) -> str:
    paths = ["--models", str(folder / "models"), "--out", str(folder / "out")]
    command = [str(Path(sys.executable).with_name("toolkit")), "bench", *SMALL, *paths, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        command, capture_output=True, text=True, timeout=240, check=False, env=environment
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.slow
def test_bench_reports_all_figures_and_keeps_earlier_arms(tmp_path: Path) -> None:
    output = _run_bench(tmp_path, "--arms", "ours", "--profile")
    for text in ("start and first step", "import vLLM", "decode step", "training step", "host"):
        assert text in output
    log = tmp_path / "out" / "ours.log"
    log_time_before = log.stat().st_mtime_ns
    # The columns of the other arms say why they cannot run. The earlier arm "ours" is kept.
    output = _run_bench(tmp_path, "--arms", "trl,unsloth", "--profile")
    assert log.stat().st_mtime_ns == log_time_before
    assert output.splitlines()[2].split() == ["ours", "trl", "unsloth"]
    report = json.loads((tmp_path / "out" / "bench.json").read_text())
    ours, trl, unsloth = report["arms"]
    assert "needs a GPU" in trl["not_run"]
    assert unsloth["not_run"] == "Unsloth is not installed"
    assert ours["not_run"] is None
    assert len(ours["step_s"]) == 2
    assert ours["completion_tokens"] == [64 * 8] * 2
    assert ours["logp_gap_max"] < 1e-5
    assert (ours["base_changed"], ours["base_total"]) == (0, 20)  # tied weights count once
    assert ours["step_over_floor"] > 1
    assert ours["peak_device_bytes"] is None
    assert ours["profile"]["decode_step"]["steps"] == 32
    for step in ("decode_step", "training_step"):
        step_profile = ours["profile"][step]
        assert step_profile["kinds"]["matrix products"]["calls"] >= 1
        assert 0 < step_profile["busy_s"] <= step_profile["wall_s"] * 1.01
        assert step_profile["host_s"] == pytest.approx(
            step_profile["wall_s"] - step_profile["busy_s"]
        )
    start_seconds = ours["profile"]["start_s"]
    assert {"import torch", "import vLLM", "first rollout"} <= set(start_seconds)
    assert all(seconds >= 0 for seconds in start_seconds.values())
    assert sum(start_seconds.values()) == pytest.approx(ours["load_s"] + ours["step_s"][0], rel=0.1)


@pytest.mark.slow
def test_bench_splits_one_model_over_two_processes(tmp_path: Path) -> None:
    report = json.loads(_run_bench(tmp_path, "--arms", "ours", "--ours-cards", "2", "--json"))
    (ours,) = report["arms"]
    assert ours["not_run"] is None, (tmp_path / "out" / "ours.log").read_text()
    assert len(ours["step_s"]) == 2
    assert ours["completion_tokens"] == [64 * 8] * 2
    assert ours["logp_gap_max"] < 1e-5
    assert report["settings"]["ours_cards"] == 2
    assert (tmp_path / "out" / "ours-1.json").is_file(), "the second process has no result"


@pytest.mark.slow
def test_an_arm_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    output = _run_bench(tmp_path, "--arms", "ours", "--limit-s", "1", "--json")
    assert json.loads(output)["arms"][0]["not_run"] == "stopped after 1 s"
