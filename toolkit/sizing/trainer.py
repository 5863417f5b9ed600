"""What the trainer takes: the adapter and its states for good, gradients, activations and the head
during a step.

Read at transformers 5.17, PEFT 0.21.2 and TRL 1.16. TRL scores completions with a fused head
(trl/kernels/chunked_logprob.py): no (batch, length, vocabulary) tensor exists, only tiles of 4096
tokens x 32768 entries. Activations are counted tensor by tensor as autograd saves them;
tests/contract/test_sizing_activations.py holds the count to what transformers and PEFT really
save.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from toolkit.sizing import lora
from toolkit.sizing.model import DTYPE_BYTES
from toolkit.sizing.terms import Term
from toolkit.sizing.weights import weight_bytes

if TYPE_CHECKING:
    from toolkit.sizing.model import Block, ModelSpec
    from toolkit.sizing.plan import EnginePlan
    from toolkit.sizing.quant import Quantization
    from toolkit.sizing.workload import Workload

Checkpointing = bool | Literal["unsloth"]
MASTER_BYTES = 4  # policy/lora.py keeps adapters in float32, their gradients too
HEAD_TOKENS = 4096  # TOKEN_CHUNK_SIZE of trl/kernels/chunked_logprob.py
HEAD_COLUMNS = 32768  # _CHUNKED_LOGPROB_CHUNK_SIZE of trl/trainer/utils.py


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """How a training step is done."""

    micro_batch: int
    accumulation: int
    checkpointing: Checkpointing  # True, False, or "unsloth": checkpoints offloaded to the host
    compute_bytes: int
    adapter_bytes: int
    own_weights: bool
    world_size: int = 1


def trainer_terms(spec: ModelSpec, plan: EnginePlan, work: Workload, step: StepPlan) -> list[Term]:
    """Every term of the trainer; those of phase "always" are there during rollouts too."""
    count = lora.adapter_parameters(spec, work.rank, work.targets)
    states = work.optimizer_bytes
    if "8bit" not in work.optimizer and states > 1:
        states = states * step.adapter_bytes / MASTER_BYTES  # moments have the parameter's dtype
    terms = []
    if step.own_weights:
        own = weight_bytes(spec, plan.dtype, plan.quantization)
        terms.append(Term("trainer.weights", own, "the trainer's own model"))
    terms += [
        Term(
            "trainer.adapter",
            count * step.adapter_bytes,
            f"{count:,} parameters of {step.adapter_bytes} bytes, r = {work.rank}",
        ),
        Term("trainer.optimizer", int(count * states), f"{states:g} bytes a parameter"),
    ]
    tokens = step.micro_batch * work.sequence
    saved, layer, moving = _activations(spec, work, step, tokens)
    head = head_bytes(spec, work, step)
    gradients = count * step.adapter_bytes
    if step.accumulation == 1:
        # They come into being layer by layer while the saved tensors of those layers go.
        gradients = max(0, gradients - saved)
    if step.world_size > 1:
        gradients += count * step.adapter_bytes  # buckets of DistributedDataParallel
    names = {True: "checkpointing", False: "no checkpointing", "unsloth": "offloaded checkpoints"}
    mode = names[step.checkpointing]
    shape = f"{step.micro_batch} x {work.sequence} tokens, {mode}"
    terms += [
        Term("trainer.gradients", gradients, f"{step.adapter_bytes} bytes a parameter", "training"),
        Term("trainer.activations", saved + layer + moving, shape, "training"),
        Term(
            "trainer.head",
            max(0, head - layer - moving if step.checkpointing else head - moving),
            f"fused head, {step.micro_batch * work.completion} rows, beyond the activations",
            "training",
        ),
    ]
    if delta := lora.expert_delta_elements(spec, work.targets):
        layers = 1 if step.checkpointing else spec.layers
        nbytes = delta * (step.adapter_bytes + layers * step.compute_bytes)
        terms.append(
            Term("trainer.expert_updates", nbytes, "PEFT forms W + BA of all experts", "training")
        )
    if unpacked := dequantized_bytes(spec, plan):
        terms.append(Term("trainer.dequantized", unpacked, "one weight in 16 bits", "training"))
    return terms


def head_bytes(spec: ModelSpec, work: Workload, step: StepPlan) -> int:
    """Peak of TRL's fused head: one tile, the scored hidden states, their float32 gradient and its
    16-bit copy.
    """
    rows = step.micro_batch * min(work.completion, work.sequence)
    width = step.compute_bytes
    tile = min(rows, HEAD_TOKENS) * HEAD_COLUMNS * width
    hidden = rows * spec.hidden_size * (width + 4 + width)
    final_norm = step.micro_batch * work.sequence * spec.hidden_size * (4 + width)
    return tile + hidden + final_norm


def activation_bytes(spec: ModelSpec, work: Workload, step: StepPlan) -> int:
    """Bytes of activations at the worst moment of a forward and backward pass, head aside."""
    return sum(_activations(spec, work, step, step.micro_batch * work.sequence))


def _activations(
    spec: ModelSpec, work: Workload, step: StepPlan, tokens: int
) -> tuple[int, int, int]:
    """(bytes that all layers keep, bytes of the one layer being recomputed, temporaries of that
    layer's backward).
    """
    widest = max(saved_per_token(block, spec, work, step) for block in spec.blocks)
    moving = tokens * max(moving_per_token(block, spec, work, step) for block in spec.blocks)
    if step.checkpointing:
        kept = 0 if step.checkpointing == "unsloth" else spec.layers
        return tokens * spec.hidden_size * step.compute_bytes * kept, tokens * widest, moving
    kept_bytes = sum(
        block.count * saved_per_token(block, spec, work, step) for block in spec.blocks
    )
    adapter = lora.adapter_parameters(spec, work.rank, work.targets)
    casts = adapter * step.compute_bytes if step.compute_bytes < step.adapter_bytes else 0
    return tokens * kept_bytes + casts, 0, moving


def saved_per_token(block: Block, spec: ModelSpec, work: Workload, step: StepPlan) -> int:
    """Bytes that autograd saves for one token of one layer."""
    width = step.compute_bytes
    # PEFT casts each adapted input up and autocast casts it down again: a copy for each module.
    casts = (
        width < step.adapter_bytes
    )  # PEFT casts each adapted input up, autocast casts it down again: a copy for each module
    hidden = spec.hidden_size
    norms = block.vectors // hidden
    total = 4 * hidden * norms
    groups: set[tuple[str, int]] = set()
    for linear in lora.adapted(spec, block, work.targets):
        total += width * work.rank
        if casts:
            total += width * linear.in_features
        elif linear.leaf not in ("o_proj", "out_proj"):
            groups.add((linear.name.split(".")[0], linear.in_features))
        if work.dropout:
            total += (1 + step.adapter_bytes) * linear.in_features
    total += sum(width * features for _, features in groups)
    total += _attention_saved(block, spec, width, work.sequence)
    total += scores_saved(spec, width, work.sequence)
    return total + _mlp_saved(block, spec, width)


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


def scores_saved(spec: ModelSpec, width: int, sequence: int) -> int:
    """The score matrices of a token that an attention without a fused kernel keeps: the softmax in
    float32, what multiplies the values, and under a cap the tanh.
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
            copies = block.active_experts if linear.copies > 1 else 1
            total += 3 * width * linear.in_features * copies
            if linear.copies > 1:
                total += 2 * width * spec.hidden_size * copies
    return total


def moving_per_token(block: Block, spec: ModelSpec, work: Workload, step: StepPlan) -> int:
    """Temporaries of one layer's backward: gradients of the MLP's inner tensors.

    They are float32 where PEFT cast an adapted input up; the hidden gradient is in two dtypes then.
    """
    down = max(
        (linear for linear in block.linears if linear.leaf == "down_proj"),
        key=lambda linear: linear.in_features,
        default=None,
    )
    inner = 4 * spec.hidden_size
    if down is not None:
        inner = down.in_features * (block.active_experts if down.copies > 1 else 1)
    if step.compute_bytes == step.adapter_bytes:
        # PEFT's 4-bit layers also copy each output (peft/tuners/lora/bnb.py).
        mlp = (2 if step.compute_bytes == MASTER_BYTES else 3) * step.compute_bytes * inner
    else:
        copies = 4 if down is not None and lora.targeted(down, work.targets) else 3
        mlp = copies * step.compute_bytes * inner + MASTER_BYTES * spec.hidden_size
    return max(mlp, _scores_moving(block, spec, work, step))


def _scores_moving(block: Block, spec: ModelSpec, work: Workload, step: StepPlan) -> int:
    """The same of the score matrices: their gradients in float32 and half as much again, when what
    the MLP saved has gone.
    """
    if spec.scores == "fused":
        return 0
    gradients = spec.heads * work.sequence * (MASTER_BYTES + step.compute_bytes // 2)
    return gradients - _mlp_saved(block, spec, step.compute_bytes)


def largest_tensor_bytes(spec: ModelSpec, work: Workload, step: StepPlan) -> int:
    """The largest tensor that a step allocates again and again: the widest activation of a
    micro-batch, or a tile of the head. All micro-batches of a step use the same pieces of memory.
    """
    widest = max(
        max(linear.in_features, linear.out_features)
        * (block.active_experts if linear.copies > 1 else 1)
        for block in spec.blocks
        for linear in block.linears
    )
    tokens = step.micro_batch * work.sequence
    rows = step.micro_batch * min(work.completion, work.sequence)
    tile = min(rows, HEAD_TOKENS) * min(HEAD_COLUMNS, spec.vocab_size)
    return max(tokens * widest, tile) * step.compute_bytes


def adapter_bytes(quantization: Quantization | None) -> int:
    """Bytes of an adapter parameter: float32, and bfloat16 on a quantized base.

    TRL 1.16 casts the adapter of a model that is ``is_loaded_in_4bit`` (grpo_trainer.py).
    """
    quantized = quantization is not None and quantization.method.startswith("bnb")
    return 2 if quantized else MASTER_BYTES


def dequantized_bytes(spec: ModelSpec, plan: EnginePlan) -> int:
    """The largest weight, unpacked for one product, of a base that bitsandbytes packs."""
    if plan.quantization is None or not plan.quantization.method.startswith("bnb"):
        return 0
    largest = max(
        linear.out_features * linear.in_features
        for block in spec.blocks
        for linear in block.linears
    )
    return largest * DTYPE_BYTES[plan.dtype]


def compute_bytes(dtype: str) -> int:
    """Bytes of an activation under autocast."""
    return DTYPE_BYTES[dtype]
