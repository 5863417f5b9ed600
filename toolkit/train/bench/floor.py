"""Compute the floor: a lower bound of the time of one GRPO step on this GPU.

Each decode step must read every weight once, and the KV cache of every sequence. Prefill and the
training step must do their matrix multiplications. LoRA does not train base weights, so the
training step is a forward pass and the part of the backward pass that computes the gradients of
activations. Both parts together need 4 operations per parameter and token (Kaplan et al. 2020,
arXiv 2001.08361, without the gradients of weights).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class Card:
    """Measured speeds of this device: bytes per second of a copy, and bf16 operations per second of
    a matrix product.
    """

    name: str
    bandwidth_bytes_s: float
    matmul_ops_s: float


@dataclass(frozen=True, slots=True)
class Work:
    """The sizes of the model and of one optimizer step. ``decode_steps`` is the number of tokens of
    the longest completion. ``mean_completion_tokens`` is the mean number of tokens of a completion.
    """

    parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    prompts: int
    sequences: int
    prompt_tokens: int
    decode_steps: float
    mean_completion_tokens: float


def measure_card() -> Card:
    """Measure the speed of this device with a copy and a product of large bf16 matrices. The
    fastest of five measurements counts. On a CPU, the matrices are smaller and float32.
    """
    import torch  # noqa: PLC0415 - heavy

    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    name = torch.cuda.get_device_name() if cuda else "CPU"
    elements = 2**30 if cuda else 2**24
    source = torch.ones(elements, device=device, dtype=dtype)
    target = torch.empty_like(source)
    copy_s = _best_seconds(partial(target.copy_, source), cuda=cuda)
    matrix_size = 8192 if cuda else 1024
    matrix = torch.randn(matrix_size, matrix_size, device=device, dtype=dtype)
    matmul_s = _best_seconds(partial(torch.mm, matrix, matrix), cuda=cuda)
    bandwidth = 2 * elements * dtype.itemsize / copy_s
    return Card(name, bandwidth, 2 * matrix_size**3 / matmul_s)


def _best_seconds(work: Callable[[], object], *, cuda: bool) -> float:
    import torch  # noqa: PLC0415 - heavy

    times = []
    for _ in range(6):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def floor_seconds(work: Work, card: Card) -> dict[str, float]:
    """Return the shortest possible time of one optimizer step in seconds, at the measured speeds of
    ``card``. The result has the times of the parts ``decode``, ``prefill`` and ``train``, and their
    sum ``step``.
    """
    read_tokens = work.mean_completion_tokens * (
        work.prompt_tokens + work.mean_completion_tokens / 2
    )
    cache_bytes = work.sequences * read_tokens * work.kv_bytes_per_token
    decode = (work.decode_steps * work.weight_bytes + cache_bytes) / card.bandwidth_bytes_s
    prompt_tokens = work.prompts * work.prompt_tokens
    prefill = 2 * work.parameters * prompt_tokens / card.matmul_ops_s
    # Each prompt counts once, because the completions of a group share the pass over the prompt.
    trained_tokens = prompt_tokens + work.sequences * work.mean_completion_tokens
    train = 4 * work.parameters * trained_tokens / card.matmul_ops_s
    return {"decode": decode, "prefill": prefill, "train": train, "step": decode + prefill + train}
