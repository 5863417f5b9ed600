"""Estimate the time of a training step roughly. The estimate is used to rank candidates that differ
in micro-batch, checkpointing and KV sleep (freeing the KV cache while training).

The card computes while the host launches the next kernels. So the time of a micro-batch is the
larger of two times: the compute time of the card, and the launch time of the host. The speeds of
card and host were measured on one H100 with an 8B Llama and 64 sequences of 320 tokens per step:

    micro-batch      8      16     32     64
    checkpointing    no     no     yes    yes
    seconds          2.46   1.82   2.31   2.29

On a slower card, a small micro-batch already uses the whole card. So on such a card a larger
micro-batch saves less time than this estimate says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.sizing.dequantized import BYTES_PER_WEIGHT, all_copies_bytes
from toolkit.sizing.packs import tokens_per_step

if TYPE_CHECKING:
    from toolkit.sizing.fit import Candidate
    from toolkit.sizing.model_blocks import ModelSpec

HOST_S_PER_LAYER = 0.0096
"""Seconds of the host for one layer's forward and backward pass."""
RECOMPUTE_FACTOR = 1.4
"""Factor by which ``HOST_S_PER_LAYER`` grows with checkpointing, which adds a second forward pass.
"""
OPERATIONS_PER_S = 4.0e14
"""Operations per second in bfloat16, including the time between matrix products."""
SLEEP_S = 0.25
"""Seconds to release the KV cache and to map it again, including the time in which torch frees the
memory of a step.
"""


DEQUANTIZE_S_PER_WEIGHT = 1.5e-12
"""Seconds to dequantize one 4-bit weight in one decode step. The time of the 16-bit matrix product
is not included. A decode step of an 8B model with 4-bit weights took 18 ms. With 16-bit weights it
would take about 7 ms.
"""


def dequantize_seconds(candidate: Candidate) -> float:
    """The seconds that 4-bit weights add to one rollout. Weights without a 16-bit copy are
    dequantized again in each decode step. Weights with a copy are dequantized once per rollout.
    """
    copies = candidate.plan.copies_bytes
    weights = (all_copies_bytes(candidate.spec, candidate.plan) - copies) // BYTES_PER_WEIGHT
    rollout_waves = -(-candidate.work.rollouts // max(candidate.plan.max_num_seqs, 1))
    seconds = weights * DEQUANTIZE_S_PER_WEIGHT * rollout_waves * candidate.work.completion_tokens
    return seconds + (SLEEP_S if copies and not candidate.plan.sleep else 0)


def training_seconds(candidate: Candidate) -> float:
    """The seconds of one optimizer step without its rollouts. With KV sleep, the time to free the
    KV cache and to map it again is included.
    """
    step = candidate.step
    recomputes = bool(step.checkpointing)
    host_seconds = (
        candidate.spec.layers * HOST_S_PER_LAYER * (RECOMPUTE_FACTOR if recomputes else 1)
    )
    # Per parameter and token, the forward pass takes 2 operations, and the backward pass to the
    # activations takes 2 more. Checkpointing adds a second forward pass.
    operations = (6 if recomputes else 4) * active_parameters(candidate.spec)
    tokens = float(step.micro_batch * candidate.work.sequence_tokens)
    if step.pack_tokens is not None:
        tokens = tokens_per_step(candidate.work, step.pack_tokens) / step.pass_count
    device_seconds = operations * tokens / OPERATIONS_PER_S
    return step.pass_count * max(host_seconds, device_seconds) + SLEEP_S * candidate.plan.sleep


def active_parameters(spec: ModelSpec) -> int:
    """The number of parameters of the linear maps that one token passes through, including the
    head.
    """
    total = spec.hidden_size * spec.vocab_size
    for block in spec.blocks:
        for linear in block.linears:
            matrix_parameters = linear.in_features * linear.out_features
            total += block.count * block.active_copies(linear) * matrix_parameters
    return total
