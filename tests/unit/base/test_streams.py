"""A process continues if stdout or stderr is lost or closed."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """\
import sys
from toolkit.base.streams import open_missing_streams, ignore_lost_streams, flush_output
open_missing_streams()
try:
    with ignore_lost_streams():
        for number in range(2000):
            print("line", number, flush=number % 7 == 0)
        sys.stdout.writelines(["the", "end"])
        print("said", file=sys.stderr)
finally:
    flush_output()
open(sys.argv[1], "w").write("done")
sys.exit(75)
"""


@pytest.mark.parametrize(
    ("redirection", "expected"),
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
def test_a_process_continues_without_its_streams(tmp_path, redirection, expected):
    mark = tmp_path / "mark"
    code = 'set -o pipefail; "$0" -c "$1" "$2" ' + redirection
    shown = subprocess.run(
        ["bash", "-c", code, sys.executable, SCRIPT, str(mark)],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert shown.returncode == 75
    assert shown.stderr.startswith(expected)
    assert bool(shown.stderr) == bool(expected)
    # No output is in this file, although it could get the descriptor of a closed stream.
    assert mark.read_text() == "done"


def test_a_child_process_inherits_the_reopened_streams(tmp_path):
    """The process of the rewards is such a child process, and so are the processes that rewards
    start.
    """
    inner = "import sys; print('said'); print('said', file=sys.stderr)"
    script = (
        "import subprocess, sys\n"
        "from toolkit.base.streams import open_missing_streams\n"
        "open_missing_streams()\n"
        f"code = subprocess.run([sys.executable, '-c', {inner!r}], check=False).returncode\n"
        "open(sys.argv[1], 'w').write(str(code))\n"
    )
    (tmp_path / "script.py").write_text(script)
    words = f"{sys.executable} {tmp_path}/script.py {tmp_path}/code >&- 2>&- <&-"
    subprocess.run(["bash", "-c", words], check=True, timeout=60)
    assert (tmp_path / "code").read_text() == "0"
    words = words.replace("/code", "/flags")
    (tmp_path / "script.py").write_text(
        "import os, sys\n"
        "from toolkit.base.streams import open_missing_streams\n"
        "open_missing_streams()\n"
        "open(sys.argv[1], 'w').write(str([os.get_inheritable(n) for n in range(3)]))\n"
    )
    subprocess.run(["bash", "-c", words], check=True, timeout=60)
    assert (tmp_path / "flags").read_text() == "[True, True, True]"
