"""Shapes of Qwen3-Next and Qwen3.5 / 3.6. They have three gated delta-net layers (with one state
per sequence) for each full-attention layer. Either all layers of a model have experts, or none has.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from toolkit.sizing.config_fields import MAX_EXPERTS
from toolkit.sizing.families.common import (
    Heads,
    Shape,
    build_blocks,
    gated_mlp,
    kv_cache,
    layer_kinds,
    read_heads,
)
from toolkit.sizing.families.moe import experts
from toolkit.sizing.families.rope import rope_tables, rotary_columns
from toolkit.sizing.model_blocks import Block, Cache, Linear

if TYPE_CHECKING:
    from toolkit.sizing.config_fields import Fields

STATES_NOTE = (
    "linear attention has one state per sequence; KV bytes per token count only other layers"
)


def qwen3_next(fields: Fields) -> Shape:
    """The shape of Qwen3-Next (transformers' Qwen3NextConfig), whose q_proj also computes the
    output gate.
    """
    return _hybrid_shape(
        fields, _sparse_mlp(fields, experts_default=512, active_default=10), fused=True
    )


def qwen3_5(fields: Fields) -> Shape:
    """The shape of the dense Qwen3.5 and 3.6 (Qwen3_5TextConfig). Its config may be the whole
    config.json, or the section text_config of a multimodal model, whose vision tower is not
    counted.
    """
    text = fields.section("text_config") or fields
    inner = text.integer("intermediate_size", default=12288)
    mlp = gated_mlp(text.integer("hidden_size"), inner)
    return _with_outer_tying(fields, _hybrid_shape(text, (mlp, 0), fused=False))


def qwen3_5_moe(fields: Fields) -> Shape:
    """The shape of Qwen3.5 and 3.6 with experts (Qwen3_5MoeTextConfig). Its config may be the whole
    config.json, or the section text_config.
    """
    text = fields.section("text_config") or fields
    sparse = _sparse_mlp(text, experts_default=256, active_default=8)
    return _with_outer_tying(fields, _hybrid_shape(text, sparse, fused=False))


def _with_outer_tying(fields: Fields, shape: Shape) -> Shape:
    """Return ``shape`` with the value of tie_word_embeddings in the outer config (the one that
    contains text_config). transformers uses this value too.
    """
    return replace(shape, tied=fields.flag("tie_word_embeddings", shape.tied))


def _sparse_mlp(
    fields: Fields, *, experts_default: int, active_default: int
) -> tuple[list[Linear], int]:
    """Return (linear maps, number of active experts) of an MLP with routed experts and a gated
    shared expert.
    """
    hidden = fields.integer("hidden_size")
    count = fields.integer("num_experts", default=experts_default, high=MAX_EXPERTS)
    inner = fields.integer("moe_intermediate_size", default=512)
    shared_inner = fields.integer("shared_expert_intermediate_size", default=512)
    mlp = [Linear("mlp.gate", count, hidden), *experts(hidden, inner, count)]
    mlp += gated_mlp(hidden, shared_inner, prefix="mlp.shared_expert")
    mlp += [Linear("mlp.shared_expert_gate", 1, hidden)]
    return mlp, fields.integer("num_experts_per_tok", default=active_default, high=MAX_EXPERTS)


def _hybrid_shape(fields: Fields, mlp: tuple[list[Linear], int], *, fused: bool) -> Shape:
    heads = read_heads(fields, default_head_dim=256)
    interval = fields.integer("full_attention_interval", default=4)
    linears_of_mlp, active = mlp

    def default_kind(index: int) -> str:
        return "linear_attention" if (index + 1) % interval else "full_attention"

    def build_block(kind: str, layers: int) -> Block:
        if kind == "full_attention":
            linears, vectors, cache = _full_attention(fields, heads)
        else:
            linears, vectors, cache = _delta_net(fields, heads.hidden, fused=fused)
        return Block(
            count=layers,
            linears=(*linears, *linears_of_mlp),
            vectors=vectors + 2 * heads.hidden,
            cache=cache,
            active_experts=active,
        )

    max_position = fields.integer("max_position_embeddings", default=32768)
    columns = rotary_columns(fields, heads.head_dim, default=0.25)
    return Shape(
        hidden=heads.hidden,
        vocab=fields.integer("vocab_size"),
        heads=heads.heads,
        head_dim=heads.head_dim,
        max_position=max_position,
        tied=fields.flag("tie_word_embeddings", False),
        blocks=build_blocks(layer_kinds(fields, default_kind), build_block),
        final_vectors=heads.hidden,
        rope_tables=rope_tables(fields, columns, max_position),
        notes=(STATES_NOTE,),
    )


def _full_attention(fields: Fields, heads: Heads) -> tuple[list[Linear], int, Cache]:
    bias = fields.flag("attention_bias", False)
    linears = [
        Linear("self_attn.q_proj", 2 * heads.query, heads.hidden, bias),
        Linear("self_attn.k_proj", heads.key, heads.hidden, bias),
        Linear("self_attn.v_proj", heads.key, heads.hidden, bias),
        Linear("self_attn.o_proj", heads.hidden, heads.query, bias),
    ]
    return linears, 2 * heads.head_dim, kv_cache(heads)


def _delta_net(fields: Fields, hidden: int, *, fused: bool) -> tuple[list[Linear], int, Cache]:
    key_heads = fields.integer("linear_num_key_heads", default=16)
    value_heads = fields.integer("linear_num_value_heads", default=32)
    key_dim = fields.integer("linear_key_head_dim", default=128)
    value_dim = fields.integer("linear_value_head_dim", default=128)
    kernel = fields.integer("linear_conv_kernel_dim", default=4)
    keys, values = key_heads * key_dim, value_heads * value_dim
    convolved = 2 * keys + values
    inputs = [
        Linear("linear_attn.in_proj_qkvz", 2 * keys + 2 * values, hidden),
        Linear("linear_attn.in_proj_ba", 2 * value_heads, hidden),
    ]
    if not fused:
        inputs = [
            Linear("linear_attn.in_proj_qkv", convolved, hidden),
            Linear("linear_attn.in_proj_z", values, hidden),
            Linear("linear_attn.in_proj_b", value_heads, hidden),
            Linear("linear_attn.in_proj_a", value_heads, hidden),
        ]
    linears = [
        *inputs,
        Linear("linear_attn.out_proj", hidden, values),
        Linear("linear_attn.conv1d", convolved, kernel),
    ]
    vectors = 2 * value_heads + value_dim
    # The engine's state per sequence: the recurrent matrix and the last kernel - 1 inputs of the
    # convolution.
    state = value_heads * key_dim * value_dim + convolved * (kernel - 1)
    return linears, vectors, Cache(kind="linear", state_elements=state)
