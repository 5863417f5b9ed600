"""Shapes of hybrid models, which combine attention with short convolutions (LFM2) or with Mamba 2
(Nemotron-H). Convolution and Mamba layers have one state per sequence instead of a KV cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.base.errors import InputError
from toolkit.sizing.config_fields import MAX_EXPERTS, MAX_LAYERS
from toolkit.sizing.families.common import (
    Heads,
    Shape,
    attention,
    build_blocks,
    kv_cache,
    layer_kinds,
    read_heads,
)
from toolkit.sizing.families.hybrid import STATES_NOTE
from toolkit.sizing.families.rope import rope_tables, rotary_columns
from toolkit.sizing.model_blocks import Block, Cache, Linear

if TYPE_CHECKING:
    from toolkit.sizing.config_fields import Fields

_KIND_OF_LETTER = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
_KIND_OF_NAME = {"linear_attention": "mamba", "full_attention": "attention"}


def lfm2(fields: Fields) -> Shape:
    """The shape of LFM2 (transformers' Lfm2Config), with gated short convolutions, and attention
    with a norm on each head.
    """
    heads = read_heads(fields)
    inner = fields.integer("intermediate_size", default=12288)
    if fields.flag("block_auto_adjust_ff_dim", True):
        multiple = fields.integer("block_multiple_of", default=256)
        factor = fields.number("block_ffn_dim_multiplier", default=1.0, low=0, high=16)
        inner = -(-int(factor * int(2 * inner / 3)) // multiple) * multiple
    kernel = fields.integer("conv_L_cache", default=3)
    bias = fields.flag("conv_bias", False)
    hidden = heads.hidden
    mlp = [
        Linear("feed_forward.w1", inner, hidden),
        Linear("feed_forward.w3", inner, hidden),
        Linear("feed_forward.w2", hidden, inner),
    ]
    indices = fields.items("full_attn_idxs", int)

    def default_kind(index: int) -> str:
        return "full_attention" if indices is None or index in indices else "conv"

    def build_block(kind: str, layers: int) -> Block:
        if kind == "full_attention":
            linears = [
                *attention(heads)[:3],
                Linear("self_attn.out_proj", hidden, heads.query),
            ]
            vectors, cache = 2 * heads.head_dim, kv_cache(heads)
        else:
            linears = [
                Linear("conv.in_proj", 3 * hidden, hidden, bias),
                Linear("conv.out_proj", hidden, hidden, bias),
                Linear("conv.conv1d", hidden, kernel, bias),
            ]
            vectors = 0
            cache = Cache(kind="linear", state_elements=hidden * (kernel - 1))
        return Block(
            count=layers, linears=(*linears, *mlp), vectors=vectors + 2 * hidden, cache=cache
        )

    max_position = fields.integer("max_position_embeddings", default=128000)
    return Shape(
        hidden=hidden,
        vocab=fields.integer("vocab_size"),
        heads=heads.heads,
        head_dim=heads.head_dim,
        max_position=max_position,
        tied=fields.flag("tie_word_embeddings", True),
        blocks=build_blocks(layer_kinds(fields, default_kind), build_block),
        final_vectors=hidden,
        rope_tables=rope_tables(fields, rotary_columns(fields, heads.head_dim), max_position),
        notes=(STATES_NOTE,),
    )


def nemotron_h(fields: Fields) -> Shape:
    """The shape of Nemotron-H (transformers' NemotronHConfig). Each layer is one of Mamba 2,
    attention without positions, an MLP without a gate, or experts.
    """
    heads = read_heads(fields, default_head_dim=128)

    def build_block(kind: str, layers: int) -> Block:
        linears, vectors, cache, active = _mixer(fields, heads, kind)
        return Block(
            count=layers,
            linears=tuple(linears),
            vectors=vectors + heads.hidden,
            cache=cache,
            active_experts=active,
        )

    return Shape(
        hidden=heads.hidden,
        vocab=fields.integer("vocab_size"),
        heads=heads.heads,
        head_dim=heads.head_dim,
        max_position=fields.integer("max_position_embeddings", default=4096),
        tied=fields.flag("tie_word_embeddings", False),
        blocks=build_blocks(_layer_kinds(fields), build_block),
        final_vectors=heads.hidden,
        notes=(STATES_NOTE,),
    )


def _layer_kinds(fields: Fields) -> tuple[str, ...]:
    """Return the kinds of the layers, from ``layers_block_type`` or from the letters M, *, - and E
    of ``hybrid_override_pattern``.
    """
    names = fields.items("layers_block_type", str)
    if names is None:
        pattern = fields.text("hybrid_override_pattern") or ""
        names = tuple(_KIND_OF_LETTER.get(letter, letter) for letter in pattern)
    kinds = tuple(_KIND_OF_NAME.get(kind, kind) for kind in names)
    unknown = sorted(set(kinds) - set(_KIND_OF_LETTER.values()))
    if not kinds or unknown or len(kinds) > MAX_LAYERS:
        raise InputError(
            f"unknown kinds of layers: {', '.join(unknown)}"
            if unknown
            else f"config.json must list 1 to {MAX_LAYERS} layers",
            where=fields.where,
            fix="set layers_block_type in config.json, or hybrid_override_pattern with the letters "
            "M, *, - and E",
        )
    return kinds


def _mixer(fields: Fields, heads: Heads, kind: str) -> tuple[list[Linear], int, Cache, int]:
    """Return four values for one kind of layer: the linear maps, the number of parameters outside
    linear maps, the cache, and the number of active experts.
    """
    no_cache = Cache(kind="none")
    if kind == "attention":
        bias = fields.flag("attention_bias", False)
        linears = [
            Linear("mixer.q_proj", heads.query, heads.hidden, bias),
            Linear("mixer.k_proj", heads.key, heads.hidden, bias),
            Linear("mixer.v_proj", heads.key, heads.hidden, bias),
            Linear("mixer.o_proj", heads.hidden, heads.query, bias),
        ]
        return linears, 0, kv_cache(heads), 0
    if kind == "mlp":
        inner, bias = fields.integer("intermediate_size"), fields.flag("mlp_bias", False)
        return _ungated_mlp("mixer", heads.hidden, inner, bias), 0, no_cache, 0
    if kind == "moe":
        return *_experts(fields, heads.hidden), no_cache, _active_experts(fields)
    return *_mamba(fields, heads.hidden), 0


def _ungated_mlp(prefix: str, hidden: int, inner: int, bias: bool, copies: int = 1) -> list[Linear]:
    return [
        Linear(f"{prefix}.up_proj", inner, hidden, bias, copies),
        Linear(f"{prefix}.down_proj", hidden, inner, bias, copies),
    ]


def _active_experts(fields: Fields) -> int:
    return fields.integer("num_experts_per_tok", default=2, high=MAX_EXPERTS)


def _experts(fields: Fields, hidden: int) -> tuple[list[Linear], int]:
    count = fields.integer("n_routed_experts", default=8, high=MAX_EXPERTS)
    inner = fields.integer("moe_intermediate_size", default=7688)
    shared_inner = fields.integer("moe_shared_expert_intermediate_size", default=7688)
    bias = fields.flag("mlp_bias", False)
    linears = [
        Linear("mixer.gate", count, hidden),
        *_ungated_mlp("mixer.experts", hidden, inner, False, count),
        *_ungated_mlp("mixer.shared_experts", hidden, shared_inner, bias),
    ]
    return linears, 0


def _mamba(fields: Fields, hidden: int) -> tuple[list[Linear], int, Cache]:
    count = fields.integer("mamba_num_heads", default=128)
    inner = count * fields.integer("mamba_head_dim", default=64)
    state = fields.integer("ssm_state_size", default=128)
    kernel = fields.integer("conv_kernel", default=4)
    convolved = inner + 2 * fields.integer("n_groups", default=8) * state
    bias = fields.flag("mamba_proj_bias", False) or fields.flag("use_bias", False)
    linears = [
        Linear("mixer.in_proj", inner + convolved + count, hidden, bias),
        Linear("mixer.out_proj", hidden, inner, bias),
        Linear("mixer.conv1d", convolved, kernel, fields.flag("use_conv_bias", True)),
    ]
    cache = Cache(kind="linear", state_elements=inner * state + convolved * (kernel - 1))
    return linears, 3 * count + inner, cache
