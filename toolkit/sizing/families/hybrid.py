"""Qwen3-Next: three gated delta-net layers (one state a sequence) for each layer of full
attention, experts in all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.sizing.families.common import (
    Heads,
    Shape,
    blocks_by_kind,
    gated_mlp,
    kv_cache,
    layer_kinds,
    read_heads,
)
from toolkit.sizing.families.moe import experts
from toolkit.sizing.families.rope import rope_tables, rotary_columns
from toolkit.sizing.fields import MAX_EXPERTS
from toolkit.sizing.model import Block, Cache, Linear

if TYPE_CHECKING:
    from toolkit.sizing.fields import Fields


def qwen3_next(fields: Fields) -> Shape:
    """Qwen3-Next (transformers' Qwen3NextConfig); q_proj makes the output gate too."""
    heads = read_heads(fields, default_head_dim=256)
    interval = fields.integer("full_attention_interval", default=4)
    count = fields.integer("num_experts", default=512, high=MAX_EXPERTS)
    inner = fields.integer("moe_intermediate_size", default=512)
    shared = fields.integer("shared_expert_intermediate_size", default=512)
    mlp = [Linear("mlp.gate", count, heads.hidden), *experts(heads.hidden, inner, count)]
    mlp += gated_mlp(heads.hidden, shared, prefix="mlp.shared_expert")
    mlp += [Linear("mlp.shared_expert_gate", 1, heads.hidden)]
    active = fields.integer("num_experts_per_tok", default=10, high=MAX_EXPERTS)

    def default(index: int) -> str:
        return "linear_attention" if (index + 1) % interval else "full_attention"

    def make(kind: str, layers: int) -> Block:
        if kind == "full_attention":
            linears, vectors, cache = _full(fields, heads)
        else:
            linears, vectors, cache = _delta_net(fields, heads.hidden)
        return Block(
            count=layers,
            linears=(*linears, *mlp),
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
        blocks=blocks_by_kind(layer_kinds(fields, default), make),
        final_vectors=heads.hidden,
        rope_tables=rope_tables(fields, columns, max_position),
        notes=("linear attention keeps one state a sequence: KV bytes a token count the rest",),
    )


def _full(fields: Fields, heads: Heads) -> tuple[list[Linear], int, Cache]:
    bias = fields.flag("attention_bias", False)
    linears = [
        Linear("self_attn.q_proj", 2 * heads.query, heads.hidden, bias),
        Linear("self_attn.k_proj", heads.key, heads.hidden, bias),
        Linear("self_attn.v_proj", heads.key, heads.hidden, bias),
        Linear("self_attn.o_proj", heads.hidden, heads.query, bias),
    ]
    return linears, 2 * heads.head_dim, kv_cache(heads)


def _delta_net(fields: Fields, hidden: int) -> tuple[list[Linear], int, Cache]:
    key_heads = fields.integer("linear_num_key_heads", default=16)
    value_heads = fields.integer("linear_num_value_heads", default=32)
    key_dim = fields.integer("linear_key_head_dim", default=128)
    value_dim = fields.integer("linear_value_head_dim", default=128)
    kernel = fields.integer("linear_conv_kernel_dim", default=4)
    keys, values = key_heads * key_dim, value_heads * value_dim
    convolved = 2 * keys + values
    linears = [
        Linear("linear_attn.in_proj_qkvz", 2 * keys + 2 * values, hidden),
        Linear("linear_attn.in_proj_ba", 2 * value_heads, hidden),
        Linear("linear_attn.out_proj", hidden, values),
        Linear("linear_attn.conv1d", convolved, kernel),
    ]
    vectors = 2 * value_heads + value_dim
    # Engine state a sequence: the recurrent matrix and the convolution's last kernel - 1 inputs.
    state = value_heads * key_dim * value_dim + convolved * (kernel - 1)
    return linears, vectors, Cache(kind="linear", state_elements=state)
