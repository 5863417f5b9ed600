"""How long a training step takes, roughly: enough to rank the ways of cutting and keeping it.

A micro-batch takes the longer of what the card computes and what the host needs to launch it. Both
rates were read on one H100 with an 8B Llama, 64 sequences of 320 tokens a step:

    micro-batch    8 plain   16 plain   32, 64 with checkpointing
    seconds        2.46      1.82       2.31, 2.29

A slower card is busy sooner, so there the larger micro-batch of a pair wins by less than is
thought.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from toolkit.sizing.fit import Case
    from toolkit.sizing.model_blocks import ModelSpec

LAYER_S = 0.0096
"""Host time of one layer's forward and backward pass."""
RECOMPUTED = 1.4
"""The same with the second forward pass of checkpointing, as a factor."""
OPERATIONS_S = 4.0e14
"""Operations a second in bfloat16, everything between the matrix products included."""
SLEEP_S = 0.25
"""Releasing the KV cache and mapping it again, with the memory of a step that torch gives back."""


def training_seconds(case: Case) -> float:
    """Seconds of one optimizer step without its rollouts, what sleep adds included."""
    step = case.step
    again = bool(step.checkpointing)
    host = case.spec.layers * LAYER_S * (RECOMPUTED if again else 1)
    # Forward and backward to the activations, 2 operations a parameter and token each.
    operations = (6 if again else 4) * active_parameters(case.spec)
    device = operations * step.micro_batch * case.work.sequence / OPERATIONS_S
    return step.accumulation * max(host, device) + SLEEP_S * case.plan.sleep


def active_parameters(spec: ModelSpec) -> int:
    """Of the linear maps that one token goes through, the head's included."""
    total = spec.hidden_size * spec.vocab_size
    for block in spec.blocks:
        for linear in block.linears:
            one = linear.in_features * linear.out_features
            total += block.count * block.uses(linear) * one
    return total
