"""The peak memory of a process, without the memory of its parent process."""

from __future__ import annotations

import subprocess
import sys


def test_the_peak_excludes_the_memory_of_the_parent_process() -> None:
    child = "from toolkit.base.process_memory import peak_resident_bytes as p; print(p())"
    parent = (
        "import subprocess, sys; held = b'x' * 400_000_000\n"
        f"subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", parent], capture_output=True, text=True, check=True, timeout=300
    )
    assert 3_000_000 < int(done.stdout) < 200_000_000


def test_the_peak_grows_with_the_allocated_memory() -> None:
    child = (
        "from toolkit.base.process_memory import peak_resident_bytes as p\n"
        "before = p(); held = b'x' * 100_000_000; print(p() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", child], capture_output=True, text=True, check=True, timeout=300
    )
    assert 90_000_000 < int(done.stdout) < 130_000_000
