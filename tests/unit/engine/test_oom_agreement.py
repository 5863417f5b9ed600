"""Two real processes that share a model: if one runs out of memory, both agree to repeat the step
or the rollout.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from toolkit.engine.mesh import current_mesh
from toolkit.engine.oom_agreement import check_peers, repeatable_phase, watch_peers
from toolkit.train.launch import child_environment, free_port

WORKER = Path(__file__).with_name("together_worker.py")
OUT_OF_MEMORY = ["OutOfMemoryError", "CUDA out of memory. Tried to allocate 2.00 GiB"]


def peer_error(number: int) -> list[str]:
    return ["PeerOutOfMemoryError", f"process {number} ran out of memory"]


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    """The results of each of two worker processes."""
    port = free_port()
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER)],
            env=child_environment(number, 2, port),
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    texts = [worker.communicate(timeout=120)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    return [json.loads(text) for text in texts]


@pytest.mark.parametrize(
    ("case", "failing"), [("first", 0), ("middle", 1), ("end", 0), ("both", None)]
)
def test_all_processes_raise_in_a_failed_step_and_can_repeat_it(
    results: list[dict[str, Any]], case: str, failing: int | None
) -> None:
    for number, found in enumerate(results):
        assert found["none"] == 2
        assert found[case] == (OUT_OF_MEMORY if failing in (number, None) else peer_error(failing))
        assert found[f"{case}, then"] == 2, "the process group still works"


def test_all_processes_repeat_a_rollout(results: list[dict[str, Any]]) -> None:
    assert [found["rollout"] for found in results] == ["drawn"] * 2
    assert [found["rollout fails"] for found in results] == [OUT_OF_MEMORY, peer_error(0)]
    assert [found["rollout fails in both"] for found in results] == [OUT_OF_MEMORY, OUT_OF_MEMORY]


def test_a_process_without_an_answer_of_its_peer_raises_an_error(
    results: list[dict[str, Any]],
) -> None:
    kind, text = results[1]["alone"]
    assert kind == "ConfigError"
    assert "process 1 ran out of memory during a rollout" in text
    assert "Tried to allocate 2.00 GiB" in text
    assert results[0]["alone"][0] == "RuntimeError", "process 0 finds the connection closed"


def test_a_single_process_exchanges_no_flags() -> None:
    assert current_mesh() is None
    with repeatable_phase():
        watch_peers()
        check_peers()
