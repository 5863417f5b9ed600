"""When a process of a run fails, one process reports the error, and all exit with its exit code."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from torch.distributed import HashStore

from toolkit.base.errors import ConfigError, NodeError, RetryError, StoppedError
from toolkit.engine.oom_agreement import PeerOutOfMemoryError
from toolkit.train import process_control
from toolkit.train.process_control import PeerFailed, Peers, is_peer_lost, join, peer_lost_error

if TYPE_CHECKING:
    from collections.abc import Callable

LOST = RuntimeError(
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"
    " [127.0.0.1]:15238. This is typically caused by a remote worker crashing."
)


@pytest.fixture(autouse=True)
def _short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_control, "ANSWER_TIMEOUT_S", 1.0)
    monkeypatch.setattr(process_control, "LISTEN_INTERVAL_S", 0.02)


def run_in_threads(*processes: Callable[[Peers], Any]) -> list[Any]:
    """Call each function in a thread, as a process of a run. Return their results or exceptions."""
    store, results = HashStore(), [None] * len(processes)

    def process(rank: int) -> None:
        try:
            results[rank] = processes[rank](Peers(store, rank, len(processes)))
        except Exception as error:  # noqa: BLE001 - the tests inspect it
            results[rank] = error

    threads = [threading.Thread(target=process, args=(n,)) for n in range(len(processes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
        assert not thread.is_alive()
    return results


def test_a_run_of_one_process_has_no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join() is None


def test_processes_that_do_not_connect_raise_retry_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(RetryError, match="the 2 processes of this run did not connect") as refused:
        join(1.0)
    assert "MASTER_PORT" in str(refused.value.fix)


def test_exchange_returns_the_values_of_all_processes() -> None:
    results = run_in_threads(*(lambda p, n=n: p.exchange("value", {"n": n}) for n in range(3)))
    assert results == [[{"n": 0}, {"n": 1}, {"n": 2}]] * 3


def test_one_process_reports_and_all_exit_with_its_code() -> None:
    ended = run_in_threads(
        lambda p: p.exception_to_raise(LOST),
        lambda p: p.exception_to_raise(ConfigError("bad reward")),
        lambda p: p.exception_to_raise(LOST),
    )
    assert isinstance(ended[1], ConfigError)
    assert [end.code for end in (ended[0], ended[2])] == [1, 1]


def test_the_process_with_a_reason_of_its_own_reports_the_failure() -> None:
    class SlowToClaim:
        """A store that delays the claim of the report, as if the process was not scheduled."""

        def __init__(self, store: Any) -> None:
            self._store = store

        def add(self, key: str, amount: int) -> int:
            if key == "told":
                time.sleep(0.15)
            return int(self._store.add(key, amount))

        def __getattr__(self, name: str) -> Any:
            return getattr(self._store, name)

    def with_a_reason(peers: Peers) -> BaseException:
        peers.store = SlowToClaim(peers.store)
        return peers.exception_to_raise(ConfigError("bad reward"))

    ended = run_in_threads(lambda p: p.exception_to_raise(LOST), with_a_reason)
    assert isinstance(ended[1], ConfigError)
    assert ended[0].code == 1


def test_an_error_in_all_processes_is_reported_once() -> None:
    ended = run_in_threads(
        *(lambda p: p.exception_to_raise(NodeError("bad card")) for _ in range(3))
    )
    kinds = sorted(type(end).__name__ for end in ended)
    assert kinds == ["NodeError", "SystemExit", "SystemExit"]
    assert {end.code for end in ended if isinstance(end, SystemExit)} == {3}


def test_the_error_names_the_process_that_ended() -> None:
    ended = run_in_threads(
        lambda p: p.exception_to_raise(LOST), lambda _: None, lambda p: p.exception_to_raise(LOST)
    )
    reported = next(end for end in ended if isinstance(end, RetryError))
    exited = next(end for end in ended if isinstance(end, SystemExit))
    assert reported.message == (
        "process 1 of this run has ended unexpectedly (Connection closed by peer [127.0.0.1]:15238)"
    )
    assert exited.code == 4


def test_all_processes_exit_with_the_code_of_a_defect() -> None:
    ended = run_in_threads(
        lambda p: p.exception_to_raise(KeyError("x")), lambda p: p.exception_to_raise(LOST)
    )
    assert isinstance(ended[0], KeyError)
    assert ended[1].code == 70


def test_a_stopped_error_names_the_process_that_did_not_answer() -> None:
    ended = run_in_threads(
        lambda p: p.exception_to_raise(StoppedError("stopped by SIGTERM")), lambda _: None
    )
    assert ended[0].message == "stopped by SIGTERM; process 1 did not answer"
    both = run_in_threads(
        *(lambda p: p.exception_to_raise(StoppedError("stopped by SIGTERM")) for _ in range(2))
    )
    reported = next(end for end in both if isinstance(end, StoppedError))
    assert reported.message == "stopped by SIGTERM"


def test_exchange_does_not_wait_for_a_failed_process() -> None:
    ended = run_in_threads(
        lambda p: p.exception_to_raise(ConfigError("no such model")),
        lambda p: p.exchange("device", None),
    )
    assert isinstance(ended[1], PeerFailed)


def test_exchange_raises_when_a_process_shows_no_sign_of_life() -> None:
    class Stopped(Peers):
        def _listen(self) -> None:
            """Count nothing, like a process that is stopped."""

    store = HashStore()
    Stopped(store, 1, 2)
    with pytest.raises(PeerFailed, match=r"no sign of life for 0\.4 s"):
        Peers(store, 0, 2, timeout_s=0.4).exchange("device")


def test_exchange_waits_for_a_slow_process() -> None:
    def slow(peers: Peers) -> Any:
        time.sleep(1.0)
        return peers.exchange("device", 1)

    store = HashStore()
    other = Peers(store, 1, 2)
    thread = threading.Thread(target=slow, args=(other,))
    thread.start()
    assert Peers(store, 0, 2, timeout_s=0.4).exchange("device", 0) == [0, 1]
    thread.join()


def test_exchange_raises_when_the_store_never_answers() -> None:
    class Stuck:
        def __getattr__(self, name: str) -> Any:
            return lambda *_: threading.Event().wait()

    with pytest.raises(PeerFailed, match="no sign of life"):
        Peers(Stuck(), 1, 2, timeout_s=0.3).exchange("device")


def test_the_second_process_reports_when_the_store_is_lost() -> None:
    class Broken:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("Broken pipe")

    reported = Peers(Broken(), 1, 3).exception_to_raise(LOST)
    assert isinstance(reported, RetryError)
    assert "process 0 of this run has ended unexpectedly" in reported.message
    exited = Peers(Broken(), 2, 3).exception_to_raise(LOST)
    assert isinstance(exited, SystemExit)
    assert exited.code == 4
    own = ConfigError("mine")
    assert Peers(Broken(), 2, 3).exception_to_raise(own) is own


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (str(LOST), True),
        ("NCCL error: remote process exited or there was a network error", True),
        ("Timed out waiting 1800000ms for recv operation to complete", True),
        ("CUDA out of memory", False),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_messages_of_a_lost_peer_are_recognized(text: str, expected: bool) -> None:
    assert is_peer_lost(RuntimeError(text)) is expected
    assert not is_peer_lost(ConfigError(text))
    assert peer_lost_error([], RuntimeError(text)).message.startswith(
        "another process of this run has ended unexpectedly"
    )


def test_the_process_that_ran_out_of_memory_reports() -> None:
    assert is_peer_lost(PeerOutOfMemoryError("process 1 ran out of memory"))
    own = ConfigError("process 1 ran out of memory: Tried to allocate 2.00 GiB")
    other = PeerOutOfMemoryError("process 1 ran out of memory")
    ended = run_in_threads(
        lambda p: p.exception_to_raise(other), lambda p: p.exception_to_raise(own)
    )
    assert ended[1] is own
    assert isinstance(ended[0], SystemExit)
    assert ended[0].code == 1


def test_an_engine_that_lost_a_peer_while_starting_is_not_a_node_error() -> None:
    error = NodeError("the engine did not start: RuntimeError")
    error.__cause__ = LOST
    assert is_peer_lost(error)
    ended = run_in_threads(lambda p: p.exception_to_raise(error), lambda _: None)
    assert isinstance(ended[0], RetryError)
