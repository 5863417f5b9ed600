"""Compute the memory of the engine without its KV cache. This memory has the following terms: the
weights, LoRA buffers, the activations of vLLM's profiling run, the sampler, CUDA graphs, and the
runtime.

Written for vLLM 0.25.1 (v1/worker/gpu_worker.py ``determine_available_memory``). The engine may use
at most gpu_memory_utilization x total memory. vLLM subtracts the terms from this limit, and gives
the rest to the KV cache. After profiling, the memory of the activations and the sampler goes back
to torch's allocator, and training in the same process can use it. The memory of the other terms
stays in use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.base.formatting import MIB, plural
from toolkit.config.engine_settings import graph_sizes
from toolkit.sizing import kv_bytes, lora_bytes
from toolkit.sizing.model_blocks import DTYPE_BYTES
from toolkit.sizing.tensor_parallel import communication_terms
from toolkit.sizing.terms import Term
from toolkit.sizing.weight_bytes import padded_vocab, weight_bytes

if TYPE_CHECKING:
    from toolkit.sizing.engine_plan import EnginePlan
    from toolkit.sizing.model_blocks import ModelSpec
    from toolkit.sizing.weight_formats import Quantization

# Bytes of cuBLAS workspaces, the attention backend's buffers and Triton's buffers. They are outside
# torch's allocator or in small tensors that stay.
RUNTIME_BYTES = 192 * MIB
# Bytes of one captured graph of one layer (driver structures and its private pool), from published
# start-up logs of 1B to 8B models: 67 sizes x 32 layers take 0.5 to 0.6 GiB.
GRAPH_LAYER_BYTES = 256 * 1024
# With LoRA, vLLM captures every size twice: with an adapter and without one
# (v1/worker/gpu/lora_utils.py, get_lora_capture_cases). On an H200, 13 sizes of the 8B shape made
# 26 graphs of 0.27 GiB.
GRAPHS_PER_SIZE = 2
# Bytes per logit of the sampler's temporary tensors: bf16 logits, their fp32 copy,
# log-probabilities, probabilities and the exponential noise (v1/sample/sampler.py and
# ops/topk_topp_sampler.py).
SAMPLER_BYTES_PER_LOGIT = 18


def engine_terms(spec: ModelSpec, plan: EnginePlan) -> list[Term]:
    """Return every term of the engine's memory except the KV cache. ``spec`` is the part of the
    model on one card (``tensor_parallel.spec_of_one_card``).
    """
    width = DTYPE_BYTES[plan.dtype]
    weights = weight_bytes(spec, plan.dtype, plan.quantization, engine=True)
    weight_format = plan.quantization.method if plan.quantization else plan.dtype
    weight_format = "as stored" if spec.sized_by_headers else weight_format
    adapters = plural(plan.max_loras, "adapter")
    terms = [
        Term("engine.weights", weights, f"{spec.parameters:,} parameters, {weight_format}"),
        Term(
            "engine.lora",
            slot_bytes(spec, plan, plan.max_lora_rank),
            f"vLLM's buffers for {adapters} of rank {plan.max_lora_rank} on the projections",
        ),
        Term(
            "engine.rope_tables",
            sum(table.nbytes(width) for table in spec.rope_tables),
            f"cosines and sines of {' and '.join(str(t.rows) for t in spec.rope_tables)} positions",
        ),
        *communication_terms(plan.tensor_parallel, on_gpu=plan.on_gpu),
    ]
    if plan.on_gpu:
        graphs = len(graph_sizes(plan.max_num_seqs, plan.max_num_batched_tokens))
        terms += [
            Term("engine.runtime", RUNTIME_BYTES, "cuBLAS and attention workspaces, estimated"),
            Term(
                "engine.cuda_graphs",
                graph_bytes(spec, plan),
                f"{graphs} sizes, with and without an adapter, x {spec.layers} layers, estimated"
                if not plan.enforce_eager
                else "none, because of enforce_eager",
            ),
        ]
    if plan.copies_bytes:
        what = "16-bit copies of 4-bit weights, freed after a rollout"
        terms.append(Term("engine.dequantized", plan.copies_bytes, what, "rollout"))
    forward = forward_bytes(spec, plan)
    sampler = sampler_bytes(spec, plan)
    terms.append(
        Term(
            "engine.activations",
            max(forward, sampler),
            f"peak of the {'forward pass' if forward >= sampler else 'sampler'} with "
            f"{plan.max_num_batched_tokens} tokens of {plan.max_num_seqs} sequences",
            "rollout",
        )
    )
    return terms


def slot_bytes(spec: ModelSpec, plan: EnginePlan, rank: int) -> int:
    """The bytes of the LoRA buffers that the engine allocates for adapters of rank ``rank``, with
    the settings of ``plan``.
    """
    elements = lora_bytes.engine_lora_elements(spec, rank, plan.max_loras, plan.lora_modules)
    return elements * DTYPE_BYTES[plan.dtype]


def forward_bytes(spec: ModelSpec, plan: EnginePlan) -> int:
    """The peak bytes of one compiled forward pass with max_num_batched_tokens tokens. In a layer,
    attention and MLP run one after the other, so only the larger of the two is counted.
    """
    width = DTYPE_BYTES[plan.dtype]
    widest = 0
    for block in spec.blocks:
        attention = sum(
            linear.out_features
            for linear in block.linears
            if "attn" in linear.name and linear.in_features == spec.hidden_size
        )
        attention = 2 * attention + spec.heads * spec.head_dim
        gate_up = 0
        for linear in block.linears:
            if "attn" in linear.name or linear.leaf in ("down_proj", "gate", "router"):
                continue
            gate_up += linear.out_features * block.active_copies(linear)
        routed = block.active_experts * spec.hidden_size
        widest = max(widest, attention, gate_up + gate_up // 2 + routed)
    per_token = (widest + 3 * spec.hidden_size) * width
    return plan.max_num_batched_tokens * per_token + _unpacked_weight_bytes(spec, plan.quantization)


def _unpacked_weight_bytes(spec: ModelSpec, quantization: Quantization | None) -> int:
    """The bytes that bitsandbytes needs for unpacked weights; 0 without bitsandbytes weights. For a
    batch of more than a few tokens, bitsandbytes unpacks one fused weight at a time to 16 bits. So
    the result is the size of the largest weight in 16 bits.
    """
    if quantization is None or quantization.method != "bnb-nf4":
        return 0
    largest = 0
    for block in spec.blocks:
        gate_and_up = [
            linear for linear in block.linears if linear.leaf in ("gate_proj", "up_proj")
        ]
        largest = max(
            largest,
            sum(linear.out_features * linear.in_features for linear in gate_and_up),
            *(linear.out_features * linear.in_features for linear in block.linears),
        )
    return 2 * largest


def sampler_bytes(spec: ModelSpec, plan: EnginePlan) -> int:
    """The peak bytes of the sampler's warm-up with max_num_seqs sequences, while the hidden states
    of the forward pass still exist.
    """
    hidden = plan.max_num_batched_tokens * spec.hidden_size * DTYPE_BYTES[plan.dtype]
    sequences = min(plan.max_num_seqs, plan.max_num_batched_tokens)
    return hidden + sequences * padded_vocab(spec.vocab_size) * SAMPLER_BYTES_PER_LOGIT


def graph_bytes(spec: ModelSpec, plan: EnginePlan) -> int:
    """The bytes that the captured CUDA graphs occupy."""
    if plan.enforce_eager:
        return 0
    sizes = graph_sizes(plan.max_num_seqs, plan.max_num_batched_tokens)
    return len(sizes) * GRAPHS_PER_SIZE * spec.layers * GRAPH_LAYER_BYTES + 64 * MIB


def kv_element_bytes(plan: EnginePlan) -> int:
    """The bytes of one number in the KV cache."""
    return 1 if plan.float8_kv_cache else DTYPE_BYTES[plan.dtype]


def kv_sequence_bytes(spec: ModelSpec, plan: EnginePlan, tokens: int) -> int:
    """The KV bytes that the engine allocates for one sequence of ``tokens`` tokens."""
    return kv_bytes.sequence_bytes(
        spec,
        tokens,
        kv_element_bytes(plan),
        block_tokens=plan.block_tokens,
        batched_tokens=plan.max_num_batched_tokens,
    )


def kv_shared_bytes(spec: ModelSpec, plan: EnginePlan, prompt_tokens: int) -> int:
    """The KV bytes of a prompt that all its completions share. Prefix caching stores these bytes
    only once, so each completion after the first needs so many bytes less. The prompt has
    ``prompt_tokens`` tokens.
    """
    return kv_bytes.shared_bytes(
        spec, prompt_tokens, kv_element_bytes(plan), block_tokens=plan.block_tokens
    )
