"""The choices of ``toolkit bench`` are those of the benchmark. The help and the refusals do not
import torch.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from toolkit.cli.bench import bench
from toolkit.train.bench.arm_settings import ARMS
from toolkit.train.bench.shapes import SHAPES


def test_help_lists_the_choices_and_imports_no_torch() -> None:
    code = (
        "import sys; from toolkit.cli.train import cli;"
        "cli(['bench', '--help'], standalone_mode=False);"
        "print(sorted({'torch', 'transformers', 'trl', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"--shape [{'|'.join(SHAPES)}]" in done.stdout
    assert f"[default: {','.join(ARMS)}]" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_an_unknown_arm_is_a_usage_error() -> None:
    outcome = CliRunner().invoke(bench, ["--arms", "ours,theirs"])
    assert outcome.exit_code == 2
    assert "unknown arm theirs" in outcome.output


@pytest.mark.parametrize("shape", ["llama-8b", None], ids=["llama-8b", "default"])
def test_a_large_shape_without_a_gpu_is_refused_at_once(tmp_path: Path, shape: str | None) -> None:
    """The refusal comes before torch is imported and before the checkpoint of 16 GiB is created."""
    paths = ["--models", str(tmp_path / "models"), "--out", str(tmp_path / "out")]
    chosen = ["--shape", shape] if shape else []
    done = subprocess.run(
        [str(Path(sys.executable).with_name("toolkit")), "bench", *chosen, *paths],
        capture_output=True, text=True, check=False, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert f"--shape: the shape {shape or 'llama-1b'} needs a GPU" in done.stderr
    assert "fix: use `--shape tiny`, or a machine with a GPU" in done.stderr
    assert done.stdout == ""
    assert not any(tmp_path.iterdir())
