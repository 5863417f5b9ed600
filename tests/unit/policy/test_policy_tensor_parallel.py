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


def together(size: int, *arguments: str) -> list[dict[str, Any]]:
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
    told = [worker.communicate(timeout=300)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * size
    return [json.loads(one) for one in told]


@pytest.mark.parametrize(
    ("size", "kv_heads", "mode"),
    [
        (2, 1, "checkpointing"),  # one KV head on both, tied tables
        (2, 2, "plain"),
        (4, 2, "plain"),
        (4, 4, "checkpointing"),
    ],
)
def test_processes_that_share_a_model_train_as_one_does(
    size: int, kv_heads: int, mode: str
) -> None:
    for found in together(size, str(kv_heads), mode):
        assert found["logits"] < 1e-5
        assert found["same start"], "an adapter does not depend on the number of processes"
        assert found["written"]
        assert found["gradient"] < 1e-5 * max(1.0, found["largest gradient"])
        assert found["norm"] < 1e-3, "of the fourth step, after three of AdamW"
        assert found["adapter"] < 1e-4, "four steps of AdamW"
        assert found["state"] < 1e-6
        assert found["state read back"]
        assert found["parts"]
        assert found["cut"] > 0
        assert found["replicas equal"]
