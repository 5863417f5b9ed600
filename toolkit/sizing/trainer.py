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
    from toolkit.sizing.workload import Workload

Checkpointing = bool | Literal["unsloth"]
ADAPTER_BYTES = 4  # policy/lora.py keeps adapters in float32, their gradients too
HEAD_TOKENS = 4096  # TOKEN_CHUNK_SIZE of trl/kernels/chunked_logprob.py
HEAD_COLUMNS = 32768  # _CHUNKED_LOGPROB_CHUNK_SIZE of trl/trainer/utils.py


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """How a training step is done."""

    micro_batch: int
    accumulation: int
    checkpointing: Checkpointing  # True, False, or "unsloth": checkpoints offloaded to the host
    compute_bytes: int
    own_weights: bool
    world_size: int = 1


def trainer_terms(spec: ModelSpec, plan: EnginePlan, work: Workload, step: StepPlan) -> list[Term]:
    """Every term of the trainer; those of phase "always" are there during rollouts too."""
    count = lora.adapter_parameters(spec, work.rank, work.targets)
    terms = []
    if step.own_weights:
        own = weight_bytes(spec, plan.dtype, plan.quantization)
        terms.append(Term("trainer.weights", own, "the trainer's own model"))
    terms += [
        Term(
            "trainer.adapter",
            count * ADAPTER_BYTES,
            f"{count:,} float32 parameters, r = {work.rank}",
        ),
        Term(
            "trainer.optimizer",
            int(count * work.optimizer_bytes),
            f"{work.optimizer_bytes:g} bytes a parameter",
        ),
    ]
    tokens = step.micro_batch * work.sequence
    saved, layer, moving = _activations(spec, work, step, tokens)
    head = head_bytes(spec, work, step)
    gradients = count * ADAPTER_BYTES
    if step.accumulation == 1:
        # They come into being layer by layer while the saved tensors of those layers go.
        gradients = max(0, gradients - saved)
    if step.world_size > 1:
        gradients += count * ADAPTER_BYTES
    names = {True: "checkpointing", False: "no checkpointing", "unsloth": "offloaded checkpoints"}
    mode = names[step.checkpointing]
    shape = f"{step.micro_batch} x {work.sequence} tokens, {mode}"
    terms += [
        Term("trainer.gradients", gradients, "float32, as the adapter", "training"),
        Term("trainer.activations", saved + layer + moving, shape, "training"),
        Term(
            "trainer.head",
            max(0, head - layer - moving if step.checkpointing else head - moving),
            f"fused head, {step.micro_batch * work.completion} rows, beyond the activations",
            "training",
        ),
    ]
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


def _activations(
    spec: ModelSpec, work: Workload, step: StepPlan, tokens: int
) -> tuple[int, int, int]:
    """(bytes that all layers keep, bytes of the one layer being recomputed, temporaries of that
    layer's backward).
    """
    widest = max(saved_per_token(block, spec, work, step) for block in spec.blocks)
    moving = tokens * max(moving_per_token(block, spec, step) for block in spec.blocks)
    if step.checkpointing:
        kept = 0 if step.checkpointing == "unsloth" else spec.layers
        return tokens * spec.hidden_size * step.compute_bytes * kept, tokens * widest, moving
    kept_bytes = sum(
        block.count * saved_per_token(block, spec, work, step) for block in spec.blocks
    )
    adapter = lora.adapter_parameters(spec, work.rank, work.targets)
    casts = adapter * step.compute_bytes if step.compute_bytes < ADAPTER_BYTES else 0
    return tokens * kept_bytes + casts, 0, moving


def saved_per_token(block: Block, spec: ModelSpec, work: Workload, step: StepPlan) -> int:
    """Bytes that autograd saves for one token of one layer."""
    width = step.compute_bytes
    casts = (
        width < ADAPTER_BYTES
    )  # PEFT casts each adapted input up, autocast casts it down again: a copy for each module
    hidden = spec.hidden_size
    norms = block.vectors // hidden
    total = 4 * hidden * norms
    groups: set[tuple[str, int]] = set()
    for linear in block.linears:
        if not lora.targeted(linear, work.targets):
            continue
        total += width * work.rank
        if casts:
            total += width * linear.in_features
        elif linear.leaf not in ("o_proj", "out_proj"):
            groups.add((linear.name.split(".")[0], linear.in_features))
        if work.dropout:
            total += (1 + ADAPTER_BYTES) * linear.in_features
    total += sum(width * features for _, features in groups)
    total += _attention_saved(block, spec, width, work.sequence)
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
    return width * (2 * query + 2 * out) + 4 * spec.heads + width * sequence + head_norms


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


def moving_per_token(block: Block, spec: ModelSpec, step: StepPlan) -> int:
    """Temporaries of one layer's backward: gradients of the MLP's inner tensors, in float32 where
    an adapter was cast to.
    """
    inner = max(
        (
            linear.in_features * (block.active_experts if linear.copies > 1 else 1)
            for linear in block.linears
            if linear.leaf == "down_proj"
        ),
        default=4 * spec.hidden_size,
    )
    casts = step.compute_bytes < ADAPTER_BYTES
    return (4 if casts else 2) * step.compute_bytes * inner


def compute_bytes(dtype: str) -> int:
    """Bytes of an activation under autocast."""
    return DTYPE_BYTES[dtype]
