"""Compute the memory of the trainer. The adapter and its optimizer states exist permanently.
Gradients, activations and the tensors of the output head exist only during a step.

Written for transformers 5.17, PEFT 0.21.2 and TRL 1.16. TRL computes the log-probabilities of
completions with a fused head (trl/kernels/chunked_logprob.py). This head never creates a tensor of
(batch, length, vocabulary). It only creates tiles of 4096 tokens x 32768 vocabulary entries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.sizing import lora_bytes
from toolkit.sizing.activations import MASTER_BYTES, activation_parts
from toolkit.sizing.model_blocks import DTYPE_BYTES
from toolkit.sizing.packs import largest_pass
from toolkit.sizing.terms import Term
from toolkit.sizing.weight_bytes import weight_bytes

if TYPE_CHECKING:
    from toolkit.sizing.engine_plan import EnginePlan
    from toolkit.sizing.model_blocks import ModelSpec
    from toolkit.sizing.weight_formats import Quantization
    from toolkit.sizing.workload import StepPlan, Workload

HEAD_TOKENS = 4096  # TOKEN_CHUNK_SIZE of trl/kernels/chunked_logprob.py
HEAD_COLUMNS = 32768  # _CHUNKED_LOGPROB_CHUNK_SIZE of trl/trainer/utils.py


def trainer_terms(spec: ModelSpec, plan: EnginePlan, work: Workload, step: StepPlan) -> list[Term]:
    """Return all memory terms of the trainer. Terms of phase "always" exist in rollouts too."""
    parameters = work.adapter_parameters(spec)
    state_bytes = work.optimizer_bytes
    terms = []
    if step.has_own_weights:
        own_weights = weight_bytes(spec, plan.dtype, plan.quantization)
        terms.append(Term("trainer.weights", own_weights, "the trainer's separate model"))
    terms += [
        Term(
            "trainer.adapter",
            parameters * MASTER_BYTES,
            f"{parameters:,} parameters of {MASTER_BYTES} bytes, r = {work.rank}",
        ),
        Term(
            "trainer.optimizer",
            int(parameters * state_bytes),
            f"{state_bytes:g} bytes per parameter",
        ),
    ]
    if work.has_reference:
        copy = parameters * MASTER_BYTES
        terms.append(Term("trainer.reference", copy, "the starting adapter, for the KL term"))
    saved, layer, temporary = activation_parts(spec, work, step)
    head = head_bytes(spec, work, step)
    gradients, explanation = parameters * MASTER_BYTES, ""
    if step.pass_count == 1:
        # Gradients are created layer by layer while the saved tensors of those layers are freed.
        gradients, explanation = (
            max(0, gradients - saved),
            ", minus the activations that are freed meanwhile",
        )
    if step.world_size > 1:
        gradients += parameters * MASTER_BYTES  # buckets of DistributedDataParallel
    names = {True: "checkpointing", False: "no checkpointing", "unsloth": "offloaded checkpoints"}
    mode = names[step.checkpointing]
    pass_size = largest_pass(work, step)
    size = f"{step.micro_batch} x {work.sequence_tokens} tokens"
    if step.pack_tokens is not None:
        size = f"packs of {pass_size.tokens:,} tokens that read {pass_size.keys:,} keys"
    shape = f"{size}, {mode}" + (", fused kernels" if step.uses_fused_kernels else "")
    terms += [
        Term(
            "trainer.gradients",
            gradients,
            f"{MASTER_BYTES} bytes per parameter{explanation}",
            "training",
        ),
        Term("trainer.activations", saved + layer + temporary, shape, "training"),
        Term(
            "trainer.head",
            max(0, head - layer - temporary if step.checkpointing else head - temporary),
            f"fused head for {pass_size.scored_tokens:,} tokens, minus a layer's temporary "
            "tensors, which exist at another time",
            "training",
        ),
    ]
    if delta := lora_bytes.expert_delta_elements(spec, work.targets):
        layers = 1 if step.checkpointing else spec.layers
        nbytes = delta * (MASTER_BYTES + layers * step.compute_bytes)
        terms.append(
            Term(
                "trainer.expert_updates", nbytes, "PEFT computes W + BA of all experts", "training"
            )
        )
    if step.is_quantized:
        unpacked = dequantized_bytes(spec, plan)
        terms.append(
            Term(
                "trainer.dequantized",
                unpacked,
                "the largest weight, unpacked to 16 bits",
                "training",
            )
        )
        if step.compute_bytes < MASTER_BYTES:
            copies = parameters * step.compute_bytes
            what = f"autocast's copy of the adapter, {step.compute_bytes} bytes per parameter"
            terms.append(Term("trainer.adapter_copies", copies, what, "training"))
    return terms


def head_bytes(spec: ModelSpec, work: Workload, step: StepPlan) -> int:
    """The peak bytes of TRL's fused head, which computes the logits in tiles.

    They are the sum of five sizes: one tile (``HEAD_TOKENS`` x ``HEAD_COLUMNS`` logits), the hidden
    states of the scored tokens, the float32 gradient of these hidden states, the copy of this
    gradient in the compute dtype, and the tensors of the final norm.
    """
    pass_size = largest_pass(work, step)
    rows = pass_size.scored_tokens
    width = step.compute_bytes
    tile = min(rows, HEAD_TOKENS) * HEAD_COLUMNS * width
    hidden = rows * spec.hidden_size * (width + 4 + width)
    final_norm = (
        pass_size.tokens * spec.hidden_size * ((width if step.uses_fused_kernels else 4) + width)
    )
    return tile + hidden + final_norm


def is_bitsandbytes(quantization: Quantization | None) -> bool:
    """Whether the base model has bitsandbytes weights. The weights may be stored in this format, or
    be quantized while the model is loaded.
    """
    return quantization is not None and quantization.method.startswith("bnb")


def dequantized_bytes(spec: ModelSpec, plan: EnginePlan) -> int:
    """The bytes of the largest weight of a quantized base model after it is dequantized to 16 bits.
    Each matrix product dequantizes one weight.
    """
    largest = max(
        linear.out_features * linear.in_features
        for block in spec.blocks
        for linear in block.linears
    )
    return largest * DTYPE_BYTES[plan.dtype]


def compute_bytes(dtype: str) -> int:
    """The bytes of one activation value under autocast."""
    return DTYPE_BYTES[dtype]
