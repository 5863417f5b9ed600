"""Streams that take nothing any more."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """\
import sys
from toolkit.base.streams import open_missing, outliving, settle
open_missing()
try:
    with outliving():
        for number in range(2000):
            print("line", number, flush=number % 7 == 0)
        sys.stdout.writelines(["the", "end"])
        print("said", file=sys.stderr)
finally:
    settle()
open(sys.argv[1], "w").write("done")
sys.exit(75)
"""


@pytest.mark.parametrize(
    ("streams", "told"),
    [
        ("| true", "warning: stdout is lost (Broken pipe); the run continues without it\nsaid\n"),
        (">/dev/full", "warning: stdout is lost (No space left on device); the run continues"),
        (">&-", "said\n"),
        (">/dev/null 2>/dev/full", ""),
        ("2>&1 | true", ""),
        (">&- 2>&-", ""),
        (">/dev/null", "said\n"),
    ],
)
def test_a_process_outlives_its_streams(tmp_path, streams, told):
    mark = tmp_path / "mark"
    code = 'set -o pipefail; "$0" -c "$1" "$2" ' + streams
    shown = subprocess.run(
        ["bash", "-c", code, sys.executable, SCRIPT, str(mark)],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert shown.returncode == 75
    assert shown.stderr.startswith(told)
    assert bool(shown.stderr) == bool(told)
    # Nothing that was printed went into a file that took a closed stream's number.
    assert mark.read_text() == "done"
