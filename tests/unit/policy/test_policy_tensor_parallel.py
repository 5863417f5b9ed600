"""A model that several processes share computes and trains as one process does: torch alone, no
engine. tests/engine/test_engine_tensor_parallel.py has the engine.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from toolkit.train.launch import child_environment, free_port

WORKER = Path(__file__).with_name("split_worker.py")
pytestmark = pytest.mark.slow


def run_workers(size: int, *arguments: str) -> list[dict[str, Any]]:
    """What each of ``size`` workers found."""
    port = free_port()
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), *arguments],
            env=child_environment(number, size, port),
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(size)
    ]
    outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * size
    return [json.loads(output) for output in outputs]


@pytest.mark.parametrize(
    ("size", "kv_heads", "mode"),
    [
        (2, 1, "checkpointing"),  # one KV head on both, tied tables
        (2, 2, "plain"),
        (4, 2, "plain"),
        (4, 4, "checkpointing"),
    ],
)
def test_processes_that_share_a_model_train_like_one_process(
    size: int, kv_heads: int, mode: str
) -> None:
    for results in run_workers(size, str(kv_heads), mode):
        assert results["logits"] < 1e-5
        assert results["same start"], "an adapter does not depend on the number of processes"
        assert results["written"]
        assert results["gradient"] < 1e-5 * max(1.0, results["largest gradient"])
        assert results["norm"] < 1e-3, "of the fourth step, after three of AdamW"
        assert results["adapter"] < 1e-4, "four steps of AdamW"
        assert results["state"] < 1e-6
        assert results["state read back"]
        assert results["parts"]
        assert results["cut"] > 0
        assert results["replicas equal"]
