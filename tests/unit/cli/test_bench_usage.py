"""What ``toolkit bench`` offers is what the benchmark has, said without torch."""

from __future__ import annotations

import subprocess
import sys

from click.testing import CliRunner

from toolkit.cli.bench import bench
from toolkit.train.bench.arm_settings import ARMS
from toolkit.train.bench.shapes import SHAPES


def test_help_offers_what_there_is_and_stays_light() -> None:
    code = (
        "import sys; from toolkit.cli.train import cli;"
        "cli(['bench', '--help'], standalone_mode=False);"
        "print(sorted({'torch', 'transformers', 'trl', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"--shape [{'|'.join(SHAPES)}]" in done.stdout
    assert f"[default: {','.join(ARMS)}]" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_an_arm_that_there_is_not_is_a_usage_error() -> None:
    outcome = CliRunner().invoke(bench, ["--arms", "ours,theirs"])
    assert outcome.exit_code == 2
    assert "unknown arm theirs" in outcome.output
