"""The calibration matrix: without a GPU the table says "not measured", and the tiny matrix runs on
the real CPU engine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "gpu" / "calibrate_matrix.py"


def run_script(out: Path, *arguments: str) -> str:
    """Run the script without a visible GPU; return its standard output."""
    process = subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(out), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def test_without_a_gpu_nothing_is_measured(tmp_path: Path) -> None:
    text = run_script(tmp_path)
    assert "no GPU: not measured" in text
    rows = [line for line in text.splitlines() if line.startswith("| ") and " len" in line]
    assert len(rows) >= 12
    assert all("not measured" in row for row in rows)
    assert (tmp_path / "calibration.md").read_text() in text + "\n"


@pytest.mark.slow
@pytest.mark.engine
def test_the_tiny_matrix_runs_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    work = tmp_path / "work"
    text = run_script(tmp_path / "out", "--dry", "--work", str(work))
    rows = [
        json.loads(line)
        for line in (tmp_path / "out" / "calibration.jsonl").read_text().splitlines()
    ]
    assert [row["run"] for row in rows] == [
        "engine",
        "r8 len128 micro2 ckpt",
        "r8 len64 micro2 plain",
        "r8 len128 micro1 ckpt 4 rows in packs of 200",
    ]
    assert not any("failed" in row for row in rows)
    assert all(
        term["predicted"] > 0 for row in rows for term in row["terms"] if "kv" in term["term"]
    )
    assert "Calibration on the CPU" in text
    second_output = run_script(tmp_path / "out", "--dry", "--work", str(work))
    assert "engine tiny" not in second_output  # runs that have a result are not repeated
    assert len((tmp_path / "out" / "calibration.jsonl").read_text().splitlines()) == 4
