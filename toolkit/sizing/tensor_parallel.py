"""Size a model that is split over several cards: describe the part of the model on one card as a
ModelSpec, and collect the facts that limit the number of cards.

vLLM splits q, k, v, gate, up and the vocabulary tables by rows, and o and down by columns. Every
card has all norms. If there are fewer KV heads than cards, several cards have the same head (vLLM
0.25.1 and 0.31.0, ``QKVParallelLinear``).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from toolkit.base.errors import ConfigError
from toolkit.base.formatting import MIB
from toolkit.config import parallel
from toolkit.sizing.terms import Term
from toolkit.sizing.weight_bytes import padded_vocab

if TYPE_CHECKING:
    from collections.abc import Mapping

    from toolkit.sizing.model_blocks import Block, Cache, Linear, ModelSpec

SPLIT_BY_COLUMNS = ("o_proj", "down_proj", "out_proj")
KV_PROJECTIONS = ("k_proj", "v_proj")
COMMUNICATION_BYTES = 512 * MIB
"""Bytes of NCCL's buffers and vLLM's all-reduce buffers on one card of a group: an estimate, not
measured.
"""


def spec_of_one_card(spec: ModelSpec, size: int) -> ModelSpec:
    """Return a spec that describes the part of the model on one card, if the model is split over
    ``size`` cards. If ``size`` is 1, return ``spec``.

    Raises:
        ConfigError: the model cannot be split over ``size`` cards.
    """
    if size == 1:
        return spec
    facts = split_facts(spec)
    problem = parallel.model_problem(facts) or parallel.shape_problem(facts, size)
    if problem is not None:
        raise ConfigError(
            problem, where=parallel.TENSOR_PARALLEL_KEY, fix="set model.tensor_parallel_size: 1"
        )
    stored = spec.stored_weights
    return replace(
        spec,
        heads=spec.heads // size,
        vocab_size=padded_vocab(spec.vocab_size) // size,
        blocks=tuple(_split_block(block, spec, size) for block in spec.blocks),
        stored_weights=None
        if stored is None
        else replace(stored, nbytes=-(-stored.nbytes // size)),
    )


def split_facts(spec: ModelSpec) -> Mapping[str, Any]:
    """Return the values that determine how a model can be split, as a dict. Its keys are the keys
    of config.json that ``config.parallel`` reads.
    """
    block = spec.blocks[0]
    down = [linear for linear in block.linears if linear.leaf == "down_proj"]
    experts = max((linear.copies for linear in block.linears), default=1)
    facts: dict[str, Any] = {
        "model_type": spec.family,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": max(block.cache.key_elements // max(spec.head_dim, 1), 1),
        "intermediate_size": max((linear.in_features for linear in down), default=None),
        "vocab_size": spec.vocab_size,
        "num_experts": experts if experts > 1 else None,
        "quantization_config": {"method": "stored"} if spec.quantization is not None else None,
    }
    return facts


def communication_terms(size: int, *, on_gpu: bool) -> list[Term]:
    """The memory terms of the buffers that each card of a group needs to communicate with the
    others.
    """
    if size == 1 or not on_gpu:
        return []
    source = f"NCCL and all-reduce buffers of a group of {size} cards, estimated"
    return [Term("engine.communication", COMMUNICATION_BYTES, source)]


def _split_block(block: Block, spec: ModelSpec, size: int) -> Block:
    return replace(
        block,
        linears=tuple(_split_linear(linear, spec, size) for linear in block.linears),
        cache=_split_cache(block.cache, spec, size),
    )


def _split_linear(linear: Linear, spec: ModelSpec, size: int) -> Linear:
    if linear.leaf in SPLIT_BY_COLUMNS:
        return replace(linear, in_features=linear.in_features // size)
    if linear.leaf in KV_PROJECTIONS:
        return replace(linear, out_features=max(linear.out_features // size, spec.head_dim))
    return replace(linear, out_features=linear.out_features // size)


def _split_cache(cache: Cache, spec: ModelSpec, size: int) -> Cache:
    """The part of ``cache`` on one card. A card has at least one KV head."""
    return replace(
        cache,
        key_elements=max(cache.key_elements // size, spec.head_dim),
        value_elements=max(cache.value_elements // size, spec.head_dim),
    )
