"""A model that several processes share computes and trains the same as in one process. These tests
use only torch; tests/engine/test_engine_tensor_parallel.py tests the engine.
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
    """Run ``size`` worker processes; return the results of each."""
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
        (2, 1, "checkpointing"),  # both processes hold the one KV head; tied embeddings
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
        assert results["same start"], "a new adapter must not depend on the number of processes"
        assert results["written"]
        assert results["gradient"] < 1e-5 * max(1.0, results["largest gradient"])
        assert results["norm"] < 1e-3, "gradient norms of four AdamW steps"
        assert results["adapter"] < 1e-4, "the adapter after four AdamW steps"
        assert results["state"] < 1e-6
        assert results["state read back"]
        assert results["parts"]
        assert results["cut"] > 0
        assert results["replicas equal"]
