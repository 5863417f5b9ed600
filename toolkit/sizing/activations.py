"""Compute the bytes of activations in a training step: the tensors that autograd saves for the
backward pass, and the temporary tensors of the backward pass.

Written for transformers 5.17 and PEFT 0.21.2. tests/contract/test_sizing_activations.py compares
the result with the bytes that autograd saves in these versions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.sizing import lora_bytes
from toolkit.sizing.packs import largest_pass

if TYPE_CHECKING:
    from toolkit.sizing.model_blocks import Block, ModelSpec
    from toolkit.sizing.packs import PassSize
    from toolkit.sizing.workload import StepPlan, Workload

MASTER_BYTES = 4  # policy/lora.py keeps adapters and their gradients in float32


def activation_bytes(spec: ModelSpec, work: Workload, step: StepPlan) -> int:
    """The peak bytes of activations in a forward and backward pass, without the output head."""
    return sum(activation_parts(spec, work, step))


def activation_parts(spec: ModelSpec, work: Workload, step: StepPlan) -> tuple[int, int, int]:
    """Return three numbers of bytes for one training step.

    - what all layers keep until the backward pass,
    - what one layer keeps while it is recomputed (0 without gradient checkpointing),
    - the temporary tensors in the backward pass of one layer.
    """
    pass_size = largest_pass(work, step)
    tokens = pass_size.tokens

    def saved_bytes_of(block: Block) -> int:
        keys = _saved_key_bytes(block, spec, pass_size, step)
        return tokens * _saved_bytes_per_token(block, spec, work, step) + keys

    temporary = max(
        max(
            tokens * _temporary_bytes_per_token(block, spec, work, step),
            _attention_backward_bytes(block, spec, pass_size, step),
        )
        for block in spec.blocks
    )
    if step.checkpointing:
        checkpointed_layers = 0 if step.checkpointing == "unsloth" else spec.layers
        widest_layer = max(saved_bytes_of(block) for block in spec.blocks)
        return (
            tokens * spec.hidden_size * step.compute_bytes * checkpointed_layers,
            widest_layer,
            temporary,
        )
    saved_bytes = sum(block.count * saved_bytes_of(block) for block in spec.blocks)
    adapter = work.adapter_parameters(spec)
    cast_bytes = adapter * step.compute_bytes if _makes_cast_copies(work, step) else 0
    return saved_bytes + cast_bytes, 0, temporary


def _saved_bytes_per_token(block: Block, spec: ModelSpec, work: Workload, step: StepPlan) -> int:
    """The bytes that autograd saves for one token in one layer."""
    width = step.compute_bytes
    makes_copies = _makes_cast_copies(work, step)
    hidden = spec.hidden_size
    norms = block.vectors // hidden
    # A fused norm keeps its input in the input's dtype and one number per token.
    total = (width * hidden + 4) * norms if step.uses_fused_kernels else 4 * hidden * norms
    groups: set[tuple[str, int]] = set()
    for linear in lora_bytes.adapted_linears(spec, block, work.targets):
        total += width * work.rank
        if makes_copies:
            total += width * linear.in_features
        elif linear.leaf not in ("o_proj", "out_proj"):
            groups.add((linear.name.split(".")[0], linear.in_features))
        if work.has_dropout:
            total += (1 + MASTER_BYTES) * linear.in_features
    total += sum(width * features for _, features in groups)
    total += _saved_attention_bytes(block, spec, step, work.sequence_tokens)
    total += _saved_score_bytes(spec, width, work.sequence_tokens)
    return total + _saved_mlp_bytes(block, spec, step)


def _makes_cast_copies(work: Workload, step: StepPlan) -> bool:
    """Whether the adapted modules make one more copy of each input. PEFT's own forward pass makes
    this copy if the run computes in 16 bits and the weights are not quantized: PEFT casts the input
    to float32, and autocast casts it back. If the adapter has no dropout, policy/lora_layer.py
    replaces PEFT's forward pass and makes no copy.
    """
    return step.compute_bytes < MASTER_BYTES and bool(work.has_dropout) and not step.is_quantized


def _uses_varlen_kernel(spec: ModelSpec, step: StepPlan) -> bool:
    """Whether the kernel ``varlen_attn`` computes the attention of packs (rows merged without
    padding). The conditions are those of ``can_use_kernel`` in policy/packed_attention.
    """
    half = step.compute_bytes < MASTER_BYTES
    return step.pack_tokens is not None and half and spec.scores == "fused" and step.on_gpu


def _saved_key_bytes(block: Block, spec: ModelSpec, pass_size: PassSize, step: StepPlan) -> int:
    """The bytes of the keys and values that a layer keeps for attention within a pack (several
    completions joined into one sequence); 0 without packs.

    The kernel ``varlen_attn`` keeps one copy of the keys and values. Without this kernel, the keys
    and values are repeated for each query head and padded. Padding makes them up to 1.25 times as
    large.
    """
    if step.pack_tokens is None:
        return 0
    elements = block.cache.key_elements + block.cache.value_elements
    if _uses_varlen_kernel(spec, step):
        return pass_size.keys * elements * step.compute_bytes
    repeated = 2 * spec.heads * spec.head_dim
    # ``_saved_attention_bytes`` counts each token's own keys and values.
    return int(1.25 * (pass_size.keys - pass_size.tokens) * repeated) * step.compute_bytes


def _attention_backward_bytes(
    block: Block, spec: ModelSpec, pass_size: PassSize, step: StepPlan
) -> int:
    """The bytes that the backward pass of attention over a pack adds to the peak memory; 0 without
    packs.

    These are the bytes of the temporary tensors, minus the bytes of the MLP's activations. The
    temporary tensors are the gradients of all keys and values, and the float32 sums of these
    gradients. The MLP's activations are subtracted, because the backward pass of the MLP runs first
    and frees them.
    """
    if step.pack_tokens is None:
        return 0
    elements = block.cache.key_elements + block.cache.value_elements
    query = spec.heads * spec.head_dim
    gradients = pass_size.keys * elements * step.compute_bytes
    sums = pass_size.tokens * (MASTER_BYTES * block.cache.key_elements + step.compute_bytes * query)
    return gradients + sums - pass_size.tokens * _saved_mlp_bytes(block, spec, step)


def _saved_attention_bytes(block: Block, spec: ModelSpec, step: StepPlan, sequence: int) -> int:
    """The bytes per token that sdpa (torch's scaled_dot_product_attention) saves: the queries, the
    keys and values (repeated for grouped queries), the output, the log-sum-exp, and the mask. The
    mask is added to the scores and has their dtype.
    """
    width = step.compute_bytes
    if block.cache.kind == "linear":
        return 12 * width * spec.hidden_size
    query = spec.heads * spec.head_dim
    output = next(
        (linear.in_features for linear in block.linears if linear.leaf == "o_proj"), query
    )
    norms = block.vectors % spec.hidden_size
    norm_bytes = width if step.uses_fused_kernels else 4
    head_norms = norm_bytes * (query + block.cache.key_elements) if norms else 0
    if _uses_varlen_kernel(
        spec, step
    ):  # ``_saved_key_bytes`` counts keys and values, and there is no mask
        return width * (query + output) + 4 * spec.heads + head_norms
    # One KV head is broadcast without a copy. Several KV heads are repeated for their queries.
    keys, values = query, output
    if block.cache.kind != "mla" and block.cache.key_elements == spec.head_dim:
        keys = values = spec.head_dim
    tensors = query + keys + values + output
    return width * (tensors + sequence) + 4 * spec.heads + head_norms


def _saved_score_bytes(spec: ModelSpec, width: int, sequence: int) -> int:
    """The bytes per token of the score matrices that attention saves for the backward pass; 0 with
    a fused kernel. ``width`` is the number of bytes of an element in the forward pass.

    Attention saves these matrices:

    - the softmax in float32
    - if ``width`` is below 4: a copy of the softmax in the dtype of the forward pass (attention
      multiplies this copy by V)
    - with soft-capping: the result of the tanh
    """
    if spec.scores == "fused":
        return 0
    weights = width if width < MASTER_BYTES else 0
    capped = width if spec.scores == "capped" else 0
    return spec.heads * sequence * (MASTER_BYTES + weights + capped)


def _saved_mlp_bytes(block: Block, spec: ModelSpec, step: StepPlan) -> int:
    """The bytes per token that the MLP saves. For each active expert (a dense MLP counts as one)
    these are three tensors: the output of the gate projection, its activation, and the output of
    the up projection. A fused MLP recomputes the activation instead of saving it.
    """
    total, width = 0, step.compute_bytes
    for linear in block.linears:
        if linear.leaf == "down_proj":
            copies = block.active_copies(linear)
            tensors_per_copy = 2 if _has_fused_mlp(block, step) else 3
            total += tensors_per_copy * width * linear.in_features * copies
            if linear.copies > 1:
                total += 2 * width * spec.hidden_size * copies
    return total


def _temporary_bytes_per_token(
    block: Block, spec: ModelSpec, work: Workload, step: StepPlan
) -> int:
    """The peak, in bytes per token, of the temporary tensors in one layer's backward pass. It is
    the larger of two numbers: the bytes for the MLP, and the bytes for the attention scores.

    The temporary tensors of the MLP are gradients. If PEFT cast the input of the down projection to
    float32, the gradients of this input are float32 too. With unquantized 16-bit weights, two
    copies of the gradient of the hidden state are added.
    """
    down = max(
        (linear for linear in block.linears if linear.leaf == "down_proj"),
        key=lambda linear: linear.in_features,
        default=None,
    )
    inner = 4 * spec.hidden_size
    if down is not None:
        inner = down.in_features * block.active_copies(down)
    is_adapted = down is not None and lora_bytes.is_targeted(down, work.targets)
    # A fused MLP overwrites two of its saved tensors with their gradients.
    reused_tensors = 1 if _has_fused_mlp(block, step) else 0
    if step.is_quantized:
        # PEFT's 4-bit layers also copy each output (peft/tuners/lora/bnb.py).
        mlp_bytes = (3 - reused_tensors) * step.compute_bytes * inner
    elif step.compute_bytes == MASTER_BYTES:
        mlp_bytes = 2 * step.compute_bytes * inner
    else:
        # There are three gradients. An adapted down projection frees its saved input before the
        # third gradient exists.
        copies = (
            (4 if _makes_cast_copies(work, step) else 2) if is_adapted else 3
        ) - reused_tensors
        mlp_bytes = copies * step.compute_bytes * inner + MASTER_BYTES * spec.hidden_size
    return max(mlp_bytes, _temporary_score_bytes(block, spec, work, step))


def _temporary_score_bytes(block: Block, spec: ModelSpec, work: Workload, step: StepPlan) -> int:
    """The bytes per token of the temporary tensors in the backward pass of the attention scores,
    minus the bytes of the MLP's activations. The result is 0 for fused attention.

    The temporary tensors need 4 bytes per score for float32 gradients. They also need half of the
    size of a value in the compute dtype per score. They are created after the backward pass of the
    MLP, which frees the activations of the MLP. Therefore the freed bytes are subtracted.
    """
    if spec.scores == "fused":
        return 0
    gradients = spec.heads * work.sequence_tokens * (MASTER_BYTES + step.compute_bytes // 2)
    return gradients - _saved_mlp_bytes(block, spec, step)


def _has_fused_mlp(block: Block, step: StepPlan) -> bool:
    """Whether a fused kernel computes the MLP. The kernel requires separate gate and up projections
    and no experts.
    """
    leaves = {linear.leaf for linear in block.linears if linear.copies == 1}
    return (
        step.uses_fused_kernels and not block.active_experts and {"gate_proj", "up_proj"} <= leaves
    )
