"""Activations of a training step, counted tensor by tensor as autograd saves them.

Read at transformers 5.17 and PEFT 0.21.2; tests/contract/test_sizing_activations.py compares the
count with what they really save.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.sizing import lora_bytes

if TYPE_CHECKING:
    from toolkit.sizing.model_blocks import Block, ModelSpec
    from toolkit.sizing.trainer_bytes import StepPlan
    from toolkit.sizing.workload import Workload

MASTER_BYTES = 4  # policy/lora.py keeps adapters and their gradients in float32


def activation_bytes(spec: ModelSpec, work: Workload, step: StepPlan) -> int:
    """Peak bytes of activations in a forward and backward pass, without the head."""
    return sum(activations(spec, work, step))


def activations(spec: ModelSpec, work: Workload, step: StepPlan) -> tuple[int, int, int]:
    """(bytes that all layers keep, bytes of the one layer being recomputed, temporaries of that
    layer's backward pass).
    """
    tokens = step.micro_batch * work.sequence
    widest = max(_saved_per_token(block, spec, work, step) for block in spec.blocks)
    moving = tokens * max(_moving_per_token(block, spec, work, step) for block in spec.blocks)
    if step.checkpointing:
        kept = 0 if step.checkpointing == "unsloth" else spec.layers
        return tokens * spec.hidden_size * step.compute_bytes * kept, tokens * widest, moving
    kept_bytes = sum(
        block.count * _saved_per_token(block, spec, work, step) for block in spec.blocks
    )
    adapter = work.adapter_parameters(spec)
    casts = adapter * step.compute_bytes if _casts(work, step) else 0
    return tokens * kept_bytes + casts, 0, moving


def _saved_per_token(block: Block, spec: ModelSpec, work: Workload, step: StepPlan) -> int:
    """Bytes that autograd saves for one token of one layer."""
    width = step.compute_bytes
    casts = _casts(work, step)
    hidden = spec.hidden_size
    norms = block.vectors // hidden
    total = 4 * hidden * norms
    groups: set[tuple[str, int]] = set()
    for linear in lora_bytes.adapted(spec, block, work.targets):
        total += width * work.rank
        if casts:
            total += width * linear.in_features
        elif linear.leaf not in ("o_proj", "out_proj"):
            groups.add((linear.name.split(".")[0], linear.in_features))
        if work.dropout:
            total += (1 + MASTER_BYTES) * linear.in_features
    total += sum(width * features for _, features in groups)
    total += _attention_saved(block, spec, width, work.sequence)
    total += _scores_saved(spec, width, work.sequence)
    return total + _mlp_saved(block, spec, width)


def _casts(work: Workload, step: StepPlan) -> bool:
    """Whether PEFT's own forward pass runs. It casts each adapted input up and autocast casts it
    down again, which makes one copy per module. policy/lora_layer.py avoids this, but uses PEFT's
    pass for dropout.
    """
    return step.compute_bytes < MASTER_BYTES and bool(work.dropout) and not step.packed


def _attention_saved(block: Block, spec: ModelSpec, width: int, sequence: int) -> int:
    """sdpa keeps q, k, v (repeated for grouped queries), the output, the log-sum-exp, and the mask
    as a bias of its dtype.
    """
    if block.cache.kind == "linear":
        return 12 * width * spec.hidden_size
    query = spec.heads * spec.head_dim
    out = next((linear.in_features for linear in block.linears if linear.leaf == "o_proj"), query)
    norms = block.vectors % spec.hidden_size
    head_norms = 4 * (query + block.cache.key_elements) if norms else 0
    # One KV head is broadcast without a copy; several are repeated for their queries.
    keys, values = query, out
    if block.cache.kind != "mla" and block.cache.key_elements == spec.head_dim:
        keys = values = spec.head_dim
    tensors = query + keys + values + out
    return width * (tensors + sequence) + 4 * spec.heads + head_norms


def _scores_saved(spec: ModelSpec, width: int, sequence: int) -> int:
    """The score matrices per token that attention without a fused kernel keeps: the softmax in
    float32, the factor of the values, and with soft-capping the tanh.
    """
    if spec.scores == "fused":
        return 0
    weights = width if width < MASTER_BYTES else 0
    capped = width if spec.scores == "capped" else 0
    return spec.heads * sequence * (MASTER_BYTES + weights + capped)


def _mlp_saved(block: Block, spec: ModelSpec, width: int) -> int:
    """The gate, its activation and the up projection, for each active expert."""
    total = 0
    for linear in block.linears:
        if linear.leaf == "down_proj":
            copies = block.uses(linear)
            total += 3 * width * linear.in_features * copies
            if linear.copies > 1:
                total += 2 * width * spec.hidden_size * copies
    return total


def _moving_per_token(block: Block, spec: ModelSpec, work: Workload, step: StepPlan) -> int:
    """Temporaries of one layer's backward: gradients of the MLP's inner tensors.

    They are float32 where PEFT cast an adapted input up. The hidden gradient exists twice.
    """
    down = max(
        (linear for linear in block.linears if linear.leaf == "down_proj"),
        key=lambda linear: linear.in_features,
        default=None,
    )
    inner = 4 * spec.hidden_size
    if down is not None:
        inner = down.in_features * block.uses(down)
    targeted = down is not None and lora_bytes.targeted(down, work.targets)
    if step.packed:
        # PEFT's 4-bit layers also copy each output (peft/tuners/lora/bnb.py).
        mlp = 3 * step.compute_bytes * inner
    elif step.compute_bytes == MASTER_BYTES:
        mlp = 2 * step.compute_bytes * inner
    else:
        # Three gradients; an adapted down projection frees its saved input before the third.
        copies = (4 if _casts(work, step) else 2) if targeted else 3
        mlp = copies * step.compute_bytes * inner + MASTER_BYTES * spec.hidden_size
    return max(mlp, _scores_moving(block, spec, work, step))


def _scores_moving(block: Block, spec: ModelSpec, work: Workload, step: StepPlan) -> int:
    """The same for the score matrices: 1.5 times their gradients in float32, after the tensors
    saved by the MLP are freed.
    """
    if spec.scores == "fused":
        return 0
    gradients = spec.heads * work.sequence * (MASTER_BYTES + step.compute_bytes // 2)
    return gradients - _mlp_saved(block, spec, step.compute_bytes)
