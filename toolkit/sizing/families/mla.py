"""Shapes of DeepSeek V2 and V3. Their multi-head latent attention (arXiv 2405.04434) caches one
latent vector and one rotary key for all heads together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.sizing.config_fields import MAX_EXPERTS, MAX_LAYERS
from toolkit.sizing.families.common import Shape, build_blocks, gated_mlp, layer_count
from toolkit.sizing.families.moe import experts
from toolkit.sizing.families.rope import rope_tables
from toolkit.sizing.model_blocks import Block, Cache, Linear

if TYPE_CHECKING:
    from toolkit.sizing.config_fields import Fields


def deepseek(fields: Fields) -> Shape:
    """The shape of DeepSeek V2, V2-Lite, V3 and R1. In V2-Lite, q_lora_rank is null, and there is
    one plain query projection.

    The correction bias of V3's router is a buffer in transformers, and not a parameter. So it is
    not counted in the number of parameters.
    """
    hidden = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    nope = fields.integer("qk_nope_head_dim", default=128)
    rope = fields.integer("qk_rope_head_dim", default=64)
    latent = fields.integer("kv_lora_rank", default=512)
    value = fields.integer("v_head_dim", default=128)
    linears, vectors = _attention(fields, hidden, heads, (nope, rope, latent, value))
    routed = fields.integer("n_routed_experts", default=0, low=0, high=MAX_EXPERTS)
    inner = fields.integer("moe_intermediate_size", default=1407)
    shared_experts = fields.integer("n_shared_experts", default=0, low=0, high=MAX_EXPERTS)
    first_dense = fields.integer("first_k_dense_replace", default=0, low=0, high=MAX_LAYERS)
    sparse_step = fields.integer("moe_layer_freq", default=1)
    # Per token one latent vector and one rotary key are cached, for any number of heads. Values are
    # not cached.
    cache = Cache(kind="mla", key_elements=latent + rope)

    def build_block(kind: str, count: int) -> Block:
        if kind == "dense":
            mlp = gated_mlp(hidden, fields.integer("intermediate_size"))
            return Block(count=count, linears=(*linears, *mlp), vectors=vectors, cache=cache)
        mlp = [Linear("mlp.gate", routed, hidden), *experts(hidden, inner, routed)]
        if shared_experts:
            mlp += gated_mlp(hidden, inner * shared_experts, prefix="mlp.shared_experts")
        return Block(
            count=count,
            linears=(*linears, *mlp),
            vectors=vectors,
            cache=cache,
            active_experts=fields.integer("num_experts_per_tok", default=8, high=MAX_EXPERTS),
        )

    kinds = [
        "dense" if index < first_dense or not routed or index % sparse_step else "sparse"
        for index in range(layer_count(fields))
    ]
    max_position = fields.integer("max_position_embeddings", default=2048)
    return Shape(
        hidden=hidden,
        vocab=fields.integer("vocab_size"),
        heads=heads,
        head_dim=nope + rope,
        max_position=max_position,
        tied=fields.flag("tie_word_embeddings", False),
        blocks=build_blocks(kinds, build_block),
        final_vectors=hidden,
        rope_tables=rope_tables(fields, rope, max_position),
    )


def _attention(
    fields: Fields, hidden: int, heads: int, sizes: tuple[int, int, int, int]
) -> tuple[list[Linear], int]:
    """Return (projections, number of norm parameters) of a layer with latent attention."""
    nope, rope, latent, value = sizes
    bias = fields.flag("attention_bias", False)
    query_rank = fields.integer("q_lora_rank", default=0, low=0)
    vectors = 2 * hidden + latent
    if query_rank:
        linears = [
            Linear("self_attn.q_a_proj", query_rank, hidden, bias),
            Linear("self_attn.q_b_proj", heads * (nope + rope), query_rank),
        ]
        vectors += query_rank
    else:
        linears = [Linear("self_attn.q_proj", heads * (nope + rope), hidden)]
    linears += [
        Linear("self_attn.kv_a_proj_with_mqa", latent + rope, hidden, bias),
        Linear("self_attn.kv_b_proj", heads * (nope + value), latent),
        Linear("self_attn.o_proj", hidden, heads * value, bias),
    ]
    return linears, vectors
