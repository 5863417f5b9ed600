"""16-bit copies of 4-bit weights while a rollout runs (engine/dequantized): what they take, and how
much of them fits beside the KV cache of a whole rollout.

They are there while sampling and gone while training, so they compete with the KV cache and not
with the activations of a step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.sizing.weight_bytes import stays_unquantized

if TYPE_CHECKING:
    from toolkit.config.run_config import RunConfig
    from toolkit.sizing.engine_plan import EnginePlan
    from toolkit.sizing.fit import Case, Fit
    from toolkit.sizing.model_blocks import ModelSpec

COPY_BYTES = 2
"""Bytes of a weight in a copy: bfloat16, whatever the run's dtype is."""
TERM = "engine.dequantized"
SPARE_SHARE = 0.01
"""Of the card: left over by copies that are sized to fit."""
LEAST_SHARE = 0.1
"""Copies of less than this share of the weights are not worth the memory."""


def all_copies(spec: ModelSpec, plan: EnginePlan) -> int:
    """Bytes of the copies of all linear layers that are 4-bit in the engine; routed experts have
    kernels of their own. 0 where nothing can be dequantized.
    """
    how = plan.quantization
    if not plan.on_gpu or plan.tensor_parallel > 1 or how is None or how.method != "bnb-nf4":
        return 0
    return COPY_BYTES * sum(
        block.count * linear.weights
        for block in spec.blocks
        for linear in block.linears
        if linear.copies == 1 and not stays_unquantized(linear, how)
    )


def written_copies(config: RunConfig, spec: ModelSpec, plan: EnginePlan) -> int:
    """Bytes that the run file asks for; 0 where it leaves the choice open or wants none."""
    wanted, whole = config.model.dequantized_rollouts, all_copies(spec, plan)
    if wanted == "auto" or wanted is False:
        return 0
    return whole if wanted is True else min(whole, int(wanted))


def room_for_copies(case: Case, fit: Fit) -> int:
    """Bytes that are left beside the KV cache of every sequence of a rollout."""
    most, spare = fit.max_sampling_bytes, 0
    written = case.config.model.gpu_memory_utilization
    if case.device is not None:
        spare = int(SPARE_SHARE * case.device.cuda_total_bytes)
        if written != "auto":
            most = min(most, int(written * case.device.cuda_total_bytes))
    return most - spare - fit.min_bytes - max(fit.kv_wanted_bytes - fit.kv_sequence_bytes, 0)


def best_copies(case: Case, fit: Fit) -> int:
    """Bytes of copies for ``case``, which has none and fits: all, or the largest layers that fit
    (the engine picks them), or none.
    """
    whole = all_copies(case.spec, case.plan)
    fitting = min(whole, room_for_copies(case, fit))
    return fitting if fitting >= max(whole * LEAST_SHARE, 1) else 0
