"""Shapes of mixtures of experts with ordinary attention: Mixtral, Qwen3-MoE, GLM-4.x, gpt-oss."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from toolkit.sizing.config_fields import MAX_EXPERTS
from toolkit.sizing.families.common import (
    BOTH_TABLES,
    attention,
    build_blocks,
    decoder,
    gated_mlp,
    kv_cache,
    layer_count,
    layer_kinds,
    read_heads,
)
from toolkit.sizing.families.rope import rope_tables, rotary_columns
from toolkit.sizing.model_blocks import Block, Linear

if TYPE_CHECKING:
    from toolkit.sizing.config_fields import Fields
    from toolkit.sizing.families.common import Shape


def experts(hidden: int, inner: int, count: int) -> list[Linear]:
    """The gate, up and down projections of ``count`` routed experts."""
    return [
        Linear("mlp.experts.gate_proj", inner, hidden, copies=count),
        Linear("mlp.experts.up_proj", inner, hidden, copies=count),
        Linear("mlp.experts.down_proj", hidden, inner, copies=count),
    ]


def mixtral(fields: Fields) -> Shape:
    """The shape of Mixtral (arXiv 2401.04088)."""
    heads = read_heads(fields)
    count = fields.integer("num_local_experts", default=8, high=MAX_EXPERTS)
    inner = fields.integer("intermediate_size")
    window = fields.integer("sliding_window", default=0, low=0) or None
    linears = attention(heads)
    linears += [Linear("mlp.gate", count, heads.hidden), *experts(heads.hidden, inner, count)]
    block = Block(
        count=layer_count(fields),
        linears=tuple(linears),
        vectors=2 * heads.hidden,
        cache=kv_cache(heads, window),
        active_experts=fields.integer("num_experts_per_tok", default=2, high=MAX_EXPERTS),
    )
    return decoder(fields, heads, (block,), lora_tables=BOTH_TABLES, max_position=32768)


def qwen3_moe(fields: Fields) -> Shape:
    """The shape of Qwen3-MoE. Every decoder_sparse_step-th layer has experts unless mlp_only_layers
    names it.
    """
    heads = read_heads(fields)
    bias = fields.flag("attention_bias", False)
    count = fields.integer("num_experts", "num_local_experts", default=128, high=MAX_EXPERTS)
    inner = fields.integer("moe_intermediate_size", default=768)
    dense_inner = fields.integer("intermediate_size", default=6144)
    sparse_step = fields.integer("decoder_sparse_step", default=1)
    dense_layers = set(fields.items("mlp_only_layers", int) or ())
    attention_linears = attention(heads, qkv_bias=bias, out_bias=bias)
    vectors = 2 * heads.hidden + 2 * heads.head_dim

    def build_block(kind: str, layers: int) -> Block:
        if kind == "sparse":
            mlp = [Linear("mlp.gate", count, heads.hidden), *experts(heads.hidden, inner, count)]
        else:
            mlp = gated_mlp(heads.hidden, dense_inner)
        return Block(
            count=layers,
            linears=(*attention_linears, *mlp),
            vectors=vectors,
            cache=kv_cache(heads),
            active_experts=fields.integer("num_experts_per_tok", default=8, high=MAX_EXPERTS)
            if kind == "sparse"
            else 0,
        )

    kinds = [
        "dense" if index in dense_layers or (index + 1) % sparse_step else "sparse"
        for index in range(layer_count(fields))
    ]
    blocks = build_blocks(kinds, build_block)
    return decoder(fields, heads, blocks, lora_tables=BOTH_TABLES, max_position=32768)


def glm4_moe(fields: Fields) -> Shape:
    """The shape of GLM-4.5 to 4.7 (transformers' Glm4MoeConfig). The first layers are dense, the
    others have routed experts and a shared expert. Rotary embeddings cover half of each head.
    """
    heads = read_heads(fields)
    bias = fields.flag("attention_bias", False)
    count = fields.integer("n_routed_experts", default=128, high=MAX_EXPERTS)
    inner = fields.integer("moe_intermediate_size", default=1408)
    shared_inner = inner * fields.integer("n_shared_experts", default=1)
    dense_count = fields.integer("first_k_dense_replace", default=1, low=0)
    norms = 2 * heads.head_dim if fields.flag("use_qk_norm", False) else 0
    active = fields.integer("num_experts_per_tok", default=8, high=MAX_EXPERTS)

    def build_block(kind: str, layers: int) -> Block:
        if kind == "dense":
            mlp = gated_mlp(heads.hidden, fields.integer("intermediate_size", default=10944))
        else:
            mlp = [Linear("mlp.gate", count, heads.hidden), *experts(heads.hidden, inner, count)]
            mlp += gated_mlp(heads.hidden, shared_inner, prefix="mlp.shared_experts")
        return Block(
            count=layers,
            linears=(*attention(heads, qkv_bias=bias), *mlp),
            vectors=2 * heads.hidden + norms,
            cache=kv_cache(heads),
            active_experts=0 if kind == "dense" else active,
        )

    kinds = ["dense" if index < dense_count else "sparse" for index in range(layer_count(fields))]
    shape = decoder(fields, heads, build_blocks(kinds, build_block), max_position=131072)
    rotary_share = fields.number("partial_rotary_factor", default=0.5, low=0, high=1)
    columns = rotary_columns(fields, heads.head_dim, default=rotary_share)
    return replace(shape, rope_tables=rope_tables(fields, columns, shape.max_position))


def gpt_oss(fields: Fields) -> Shape:
    """The shape of gpt-oss. It has biases on all linear maps and experts, one attention sink per
    head, and a sliding window on every other layer.
    """
    heads = read_heads(fields, default_head_dim=64)
    count = fields.integer("num_local_experts", "num_experts", default=128, high=MAX_EXPERTS)
    inner = fields.integer("intermediate_size", default=2880)
    window = fields.integer("sliding_window", default=128)
    bias = fields.flag("attention_bias", True)
    linears = attention(heads, qkv_bias=bias, out_bias=bias)
    linears += [
        Linear("mlp.router", count, heads.hidden, bias=True),
        Linear("mlp.experts.gate_up_proj", 2 * inner, heads.hidden, bias=True, copies=count),
        Linear("mlp.experts.down_proj", heads.hidden, inner, bias=True, copies=count),
    ]
    active = fields.integer("num_experts_per_tok", "experts_per_token", default=4, high=MAX_EXPERTS)

    def default_kind(index: int) -> str:
        return "sliding_attention" if (index + 1) % 2 else "full_attention"

    def build_block(kind: str, layers: int) -> Block:
        layer_window = window if kind == "sliding_attention" else None
        return Block(
            count=layers,
            linears=tuple(linears),
            vectors=2 * heads.hidden + heads.heads,
            cache=kv_cache(heads, layer_window),
            active_experts=active,
        )

    blocks = build_blocks(layer_kinds(fields, default_kind), build_block)
    # transformers has no fused attention kernel that supports sinks.
    shape = decoder(fields, heads, blocks, max_position=32768)
    tables = tuple(replace(table, float32=True) for table in shape.rope_tables)
    return replace(shape, scores="eager", rope_tables=tables)
