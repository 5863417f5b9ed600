"""A rough estimate of the time of a training step, to rank candidates (micro-batch, checkpointing,
KV sleep).

A micro-batch takes the larger of the card's compute time and the host's launch time.
Both rates were measured on one H100 with an 8B Llama and 64 sequences of 320 tokens per step:

    micro-batch    8 plain   16 plain   32, 64 with checkpointing
    seconds        2.46      1.82       2.31, 2.29

A slower card is fully used earlier, so there a larger micro-batch gains less than estimated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.sizing.dequantized import COPY_BYTES, all_copies
from toolkit.sizing.packs import step_tokens

if TYPE_CHECKING:
    from toolkit.sizing.fit import Case
    from toolkit.sizing.model_blocks import ModelSpec

LAYER_S = 0.0096
"""Host time of one layer's forward and backward pass."""
RECOMPUTED = 1.4
"""The same with the second forward pass of checkpointing, as a factor."""
OPERATIONS_S = 4.0e14
"""Operations per second in bfloat16, including the time between matrix products."""
SLEEP_S = 0.25
"""Time to release the KV cache and map it again, with the memory of a step that torch frees."""


DEQUANTIZE_S = 1.5e-12
"""A 4-bit weight in one decode step on top of its product in 16 bits: 18 ms a step of an 8B model
were measured where 16-bit weights take about 7."""


def added_seconds(case: Case) -> float:
    """Seconds of one rollout that 4-bit weights without a copy add, or copies to be made."""
    copies = case.plan.dequantized
    weights = (all_copies(case.spec, case.plan) - copies) // COPY_BYTES
    waves = -(-case.work.rollouts // max(case.plan.max_num_seqs, 1))
    seconds = weights * DEQUANTIZE_S * waves * case.work.completion_tokens
    return seconds + (SLEEP_S if copies and not case.plan.sleep else 0)


def training_seconds(case: Case) -> float:
    """Seconds of one optimizer step without its rollouts, including the time for KV sleep."""
    step = case.step
    again = bool(step.checkpointing)
    host = case.spec.layers * LAYER_S * (RECOMPUTED if again else 1)
    # Forward pass and backward pass to the activations: 2 operations per parameter and token each.
    operations = (6 if again else 4) * active_parameters(case.spec)
    tokens = float(step.micro_batch * case.work.sequence_tokens)
    if step.pack_tokens is not None:
        tokens = step_tokens(case.work, step.pack_tokens) / step.pieces
    device = operations * tokens / OPERATIONS_S
    return step.pieces * max(host, device) + SLEEP_S * case.plan.sleep


def active_parameters(spec: ModelSpec) -> int:
    """Parameters of the linear maps that one token passes through, including the head."""
    total = spec.hidden_size * spec.vocab_size
    for block in spec.blocks:
        for linear in block.linears:
            one = linear.in_features * linear.out_features
            total += block.count * block.uses(linear) * one
    return total
