"""If a memory-mapped file is truncated, the process prints one line and ends with exit code 2."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

from toolkit.base.mapped_files import BUS_ERROR_MESSAGE

if TYPE_CHECKING:
    from pathlib import Path

READ = """
import mmap, os, sys, threading
from toolkit.base.mapped_files import exit_on_bus_errors
exit_on_bus_errors()
exit_on_bus_errors()
with open(sys.argv[1], "r+b") as file:
    mapped = mmap.mmap(file.fileno(), 0)
os.truncate(sys.argv[1], 0)
read = lambda: mapped[8192:8200]
if sys.argv[2] == "thread":
    thread = threading.Thread(target=read); thread.start(); thread.join()
elif sys.argv[2] == "numpy":
    import numpy
    numpy.frombuffer(mapped, dtype=numpy.uint8).sum()
else:
    read()
print("not reached")
"""


def run_until_bus_error(tmp_path: Path, how: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "weights").write_bytes(bytes(1 << 20))
    command = [sys.executable, "-W", "ignore", "-c", READ, str(tmp_path / "weights"), how]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_a_bus_error_prints_the_message(tmp_path: Path) -> None:
    done = run_until_bus_error(tmp_path, "main")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", BUS_ERROR_MESSAGE)


def test_a_bus_error_in_a_thread_prints_the_message(tmp_path: Path) -> None:
    done = run_until_bus_error(tmp_path, "thread")
    assert (done.returncode, done.stderr) == (2, BUS_ERROR_MESSAGE)


def test_a_bus_error_inside_a_library_prints_the_message(tmp_path: Path) -> None:
    done = run_until_bus_error(tmp_path, "numpy")
    assert (done.returncode, done.stderr) == (2, BUS_ERROR_MESSAGE)
