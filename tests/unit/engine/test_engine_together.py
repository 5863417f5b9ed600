"""Two real processes that share a model decide together whether they repeat what one of them had
no memory for.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from toolkit.engine.mesh import current_mesh
from toolkit.engine.together import check_peers, repeatable_phase, watch_peers
from toolkit.train.launch import child_environment, free_port

WORKER = Path(__file__).with_name("together_worker.py")
FULL = ["OutOfMemoryError", "CUDA out of memory. Tried to allocate 2.00 GiB"]


def elsewhere(number: int) -> list[str]:
    return ["PeerOutOfMemoryError", f"process {number} ran out of memory"]


@pytest.fixture(scope="module")
def told() -> list[dict[str, Any]]:
    """What each of two processes found."""
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
def test_all_processes_leave_a_step_and_repeat_it(
    told: list[dict[str, Any]], case: str, failing: int | None
) -> None:
    for number, found in enumerate(told):
        assert found["none"] == 2
        assert found[case] == (FULL if failing in (number, None) else elsewhere(failing))
        assert found[f"{case}, then"] == 2, "the group is as it was"


def test_a_rollout_is_repeated_by_all(told: list[dict[str, Any]]) -> None:
    assert [found["rollout"] for found in told] == ["drawn"] * 2
    assert [found["rollout fails"] for found in told] == [FULL, elsewhere(0)]
    assert [found["rollout fails in both"] for found in told] == [FULL, FULL]


def test_a_process_that_gets_no_answer_ends_the_run(told: list[dict[str, Any]]) -> None:
    kind, text = told[1]["alone"]
    assert kind == "ConfigError"
    assert "process 1 ran out of memory during a rollout" in text
    assert "Tried to allocate 2.00 GiB" in text
    assert told[0]["alone"][0] == "RuntimeError", "the other one finds the connection closed"


def test_one_process_agrees_with_nobody() -> None:
    assert current_mesh() is None
    with repeatable_phase():
        watch_peers()
        check_peers()
