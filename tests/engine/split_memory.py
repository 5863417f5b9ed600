"""A worker process: one of two engines that share a model. First both run out of memory in a
rollout, then only one. Started by test_engine_tensor_parallel.py.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import engine_checkpoints
import torch
from conftest import small_options

from toolkit.base.errors import ToolkitError
from toolkit.engine import oom_agreement
from toolkit.engine.mesh import create_default_group
from toolkit.engine.open_engine import open_engine
from toolkit.engine.rollout_request import Sampling

PROMPTS = [[12] * 14, [15] * 16, [12] * 20]
"""Longer than twelve tokens, so that a step of at most twelve tokens samples one token per
sequence.
"""


def limit_sequences(forward: Any, max_sequences: int) -> Any:
    """``forward`` that raises an out-of-memory error in a step of more than ``max_sequences``
    sequences, after the first three steps.
    """
    steps: list[int] = []

    def limited_forward(*args: Any, **kwargs: Any) -> Any:
        tokens = kwargs.get("input_ids", args[0] if args else None)
        steps.append(tokens.shape[0])
        if len(steps) > 3 and max_sequences < tokens.shape[0] <= 12:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")
        return forward(*args, **kwargs)

    return limited_forward


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    create_default_group()
    rank = os.environ["RANK"]
    if rank == "0":
        engine_checkpoints.make_checkpoint(folder, "llama")
    torch.distributed.barrier()
    sampling = Sampling(n=4, max_tokens=10)
    engine_options = small_options(folder, tensor_parallel_size=2, block_size=32, extra={})
    engine = open_engine(engine_options)
    expected = engine.generate(PROMPTS, sampling, seed=6).completion_ids
    forward = engine.module.forward
    engine.module.forward = limit_sequences(forward, 5)
    repeated = engine.generate(PROMPTS, sampling, seed=6).completion_ids
    results: dict[str, Any] = {
        "same": repeated == expected,
        "most": engine._max_completions_per_call,
    }
    engine.module.forward = forward
    engine._max_completions_per_call = None
    results["as before"] = engine.generate(PROMPTS, sampling, seed=6).completion_ids == expected
    oom_agreement.PEER_TIMEOUT_S = 5.0
    if rank == "1":
        engine.module.forward = limit_sequences(forward, 5)
    try:
        engine.generate(PROMPTS, sampling, seed=6)
    except ToolkitError as error:
        results["alone"] = [type(error).__name__, error.message, str(error.fix)]
    print(json.dumps(results), flush=True)
    os._exit(0)  # without cleanup: the other engine waits in an all-reduce


if __name__ == "__main__":
    main(Path(sys.argv[1]))
