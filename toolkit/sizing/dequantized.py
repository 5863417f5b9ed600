"""Compute the size of the 16-bit copies of 4-bit weights (engine/dequantized): how many bytes all
copies need, and how many bytes of copies fit beside the KV cache of a rollout.

The copies exist only during a rollout, and not during a training step. So they compete for memory
with the KV cache, and not with the activations of training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.sizing.weight_bytes import stays_unquantized

if TYPE_CHECKING:
    from toolkit.config.run_config import RunConfig
    from toolkit.sizing.engine_plan import EnginePlan
    from toolkit.sizing.fit import Candidate, Fit
    from toolkit.sizing.model_blocks import ModelSpec

BYTES_PER_WEIGHT = 2
"""Bytes of one weight in a copy, which is bfloat16 for every dtype of the run."""
TERM = "engine.dequantized"
UNUSED_SHARE = 0.01
"""The fraction of the card's memory that copies never use, even if only some copies fit."""
MIN_COPY_SHARE = 0.1
"""Copies of less than this share of the weights are not worth their memory."""


def all_copies_bytes(spec: ModelSpec, plan: EnginePlan) -> int:
    """The size in bytes of 16-bit copies of all 4-bit linear layers in the engine. The size is 0 if
    the engine has no such layers. Routed experts are never copied, because they have their own
    kernels.
    """
    quantization = plan.quantization
    if (
        not plan.on_gpu
        or plan.tensor_parallel > 1
        or quantization is None
        or quantization.method != "bnb-nf4"
    ):
        return 0
    return BYTES_PER_WEIGHT * sum(
        block.count * linear.weights
        for block in spec.blocks
        for linear in block.linears
        if linear.copies == 1 and not stays_unquantized(linear, quantization)
    )


def requested_copy_bytes(config: RunConfig, spec: ModelSpec, plan: EnginePlan) -> int:
    """The bytes of copies that the run file requests with model.dequantized_rollouts; 0 if this key
    is "auto" or false.
    """
    requested, all_bytes = config.model.dequantized_rollouts, all_copies_bytes(spec, plan)
    if requested == "auto" or requested is False:
        return 0
    return all_bytes if requested is True else min(all_bytes, int(requested))


def available_copy_bytes(candidate: Candidate, fit: Fit) -> int:
    """The bytes of 16-bit copies that fit beside a KV cache for all sequences of a rollout."""
    max_bytes, unused_bytes = fit.max_sampling_bytes, 0
    configured = candidate.config.model.gpu_memory_utilization
    if candidate.device is not None:
        unused_bytes = int(UNUSED_SHARE * candidate.device.cuda_total_bytes)
        if configured != "auto":
            max_bytes = min(max_bytes, int(configured * candidate.device.cuda_total_bytes))
    return (
        max_bytes
        - unused_bytes
        - fit.min_bytes
        - max(fit.kv_wanted_bytes - fit.kv_sequence_bytes, 0)
    )


def best_copy_bytes(candidate: Candidate, fit: Fit) -> int:
    """Return how many bytes of 16-bit copies the engine should make. ``candidate`` fits without
    copies.

    If the copies of all weights fit, the result is their size. Otherwise it is the size of the free
    memory, and the engine copies the largest layers first. If the free memory is less than a tenth
    of the size of all copies, the result is 0.
    """
    all_bytes = all_copies_bytes(candidate.spec, candidate.plan)
    fitting_bytes = min(all_bytes, available_copy_bytes(candidate, fit))
    return fitting_bytes if fitting_bytes >= max(all_bytes * MIN_COPY_SHARE, 1) else 0
