"""The launcher of one node returns one exit code, forwards signals, and leaves no process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from toolkit.base.errors import InputError, StoppedError
from toolkit.train import launch

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def launch_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that launches processes. They run a shell command, not the toolkit."""

    def run_line(line: str) -> int:
        script = tmp_path / "python"
        script.write_text(f"#!/bin/sh\n{line}\n")
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))
        monkeypatch.chdir(tmp_path)
        return launch.launch(["train", "run.yaml"], 2)

    monkeypatch.setattr(launch, "GRACE_PERIOD_S", 0.5)
    monkeypatch.setattr(launch, "POLL_S", 0.01)
    return run_line


def test_each_process_gets_the_variables_of_torchrun(launch_shell, tmp_path: Path) -> None:
    line = 'echo "$* $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT" >out$RANK'
    assert launch_shell(line) == 0
    outputs = [(tmp_path / f"out{n}").read_text().split() for n in (0, 1)]
    assert [words[:6] for words in outputs] == [
        ["-m", "toolkit", "train", "run.yaml", "2", str(n)] for n in (0, 1)
    ]
    assert outputs[0][6:8] == ["2", "127.0.0.1"]
    assert outputs[0][8] == outputs[1][8]


def test_ranks_are_counted_over_all_nodes(
    launch_shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks of a node are consecutive, so processes that share a model are on one node."""
    for name, value in (("PET_NNODES", "3"), ("PET_NODE_RANK", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(InputError, match="The processes of 3 nodes"):
        launch_shell("exit 0")
    monkeypatch.setenv("MASTER_ADDR", "first.nodes")
    monkeypatch.setenv("MASTER_PORT", "29400")
    line = 'echo "$LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT" >out$RANK'
    assert launch_shell(line) == 0
    outputs = [(tmp_path / f"out{n}").read_text().split() for n in (4, 5)]
    assert outputs == [[str(n), "6", "2", "first.nodes", "29400"] for n in (0, 1)]
    monkeypatch.setenv("PET_NODE_RANK", "3")
    with pytest.raises(InputError, match="PET_NODE_RANK=3 must be below PET_NNODES=3"):
        launch_shell("exit 0")


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("exit 75", 75),
        ("[ $RANK = 1 ] && exit 3; sleep 0.2; exit 1", 3),
        ("[ $RANK = 1 ] && kill -9 $$; sleep 0.1; exit 4", 4),
        ("kill -9 $$", 137),
        ("[ $RANK = 1 ] && exit 1; exec sleep 60", 1),
        ("[ $RANK = 1 ] && exit 1; trap '' TERM; while :; do sleep 0.1; done", 1),
    ],
)
def test_launch_returns_one_exit_code_and_ends_all_processes(
    launch_shell, line: str, code: int
) -> None:
    begin = time.monotonic()
    assert launch_shell(line) == code
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_each_process_gets_a_signal_once(
    launch_shell, tmp_path: Path, number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    ready = [tmp_path / "ready0", tmp_path / "ready1"]

    def send() -> None:
        while not all(path.exists() for path in ready):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()
    name = number.name.removeprefix("SIG")
    assert (
        launch_shell(
            f"trap 'echo got >>got$RANK; exit 75' {name}\n>ready$RANK\nwhile :; do sleep 0.05; done"
        )
        == 75
    )
    assert [(tmp_path / f"got{n}").read_text() for n in (0, 1)] == ["got\n"] * 2
    assert signal.getsignal(number) is before


def test_a_signal_before_the_run_begins_raises_stopped_error(launch_shell, tmp_path: Path) -> None:
    ready = [tmp_path / "ready0", tmp_path / "ready1"]

    def send() -> None:
        while not all(path.exists() for path in ready):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send, daemon=True).start()
    with pytest.raises(StoppedError, match="stopped by SIGTERM before the run began") as caught:
        launch_shell(">ready$RANK\nexec sleep 60")
    assert caught.value.exit_code == 75


RANK_SCRIPT = """\
import os, sys, time
from toolkit.cli.early_signals import early_stop_signals
with early_stop_signals():
    open(f"pid{os.environ['RANK']}", "w").write(str(os.getpid()))
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl of the Linux kernel")
def test_processes_end_when_their_launcher_is_killed(tmp_path: Path) -> None:
    """The launched processes have set the signal handlers of the command line, and wait."""
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\nexec {sys.executable} rank.py\n")
    script.chmod(0o755)
    (tmp_path / "rank.py").write_text(RANK_SCRIPT)
    code = f"import sys; sys.executable = {str(script)!r}\n"
    code += "from toolkit.train.launch import launch; launch([], 2)"
    launcher = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    files = [tmp_path / "pid0", tmp_path / "pid1"]
    wait_for(lambda: all(path.exists() and path.read_text() for path in files))
    launcher.kill()
    launcher.wait()
    for path in files:
        wait_for(lambda path=path: not is_running(int(path.read_text())))


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_server_can_bind_a_free_port() -> None:
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", launch.free_port()))
