"""The shape of Gemma 4.

The model differs from Gemma 3 in these points:

- Full-attention layers have larger heads. Their keys may also be used as values.
- Some layers use the KV cache of an earlier layer.
- Each layer has its own embedding.
- Some models add experts to the MLP.
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
)
from toolkit.sizing.families.rope import rope_tables
from toolkit.sizing.model_blocks import Block, Cache, Linear

if TYPE_CHECKING:
    from toolkit.sizing.config_fields import Fields


def gemma4(fields: Fields) -> Shape:
    """The shape of the language model of Gemma 4 (transformers' Gemma4TextConfig). Its config may
    be the whole config.json, or the section text_config. Towers for images and sound are not
    counted.
    """
    text = fields.section("text_config") or fields
    shape = _text_shape(text)
    return replace(shape, tied=fields.flag("tie_word_embeddings", shape.tied))


def _text_shape(fields: Fields) -> Shape:
    hidden = fields.integer("hidden_size", default=2304)
    heads = fields.integer("num_attention_heads", default=8)
    head_dim = fields.integer("head_dim", default=256)
    kv_heads = fields.integer("num_key_value_heads", default=4)
    sliding_heads = Heads(hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    as_values = fields.flag("attention_k_eq_v", False)
    full_kv_heads = (
        fields.integer("num_global_key_value_heads", default=kv_heads) if as_values else kv_heads
    )
    full_heads = replace(
        sliding_heads,
        kv_heads=full_kv_heads,
        head_dim=fields.integer("global_head_dim", default=512),
    )
    kinds = layer_kinds(
        fields, lambda index: "sliding_attention" if (index + 1) % 6 else "full_attention"
    )
    kinds = (*kinds[:-1], "full_attention") if not fields.has("layer_types") else kinds
    first_shared = len(kinds) - fields.integer("num_kv_shared_layers", default=0, low=0)
    window = fields.integer("sliding_window", default=512)
    inputs = fields.integer("hidden_size_per_layer_input", default=256, low=0)

    def build_block(kind: str, count: int) -> Block:
        sliding, has_own_cache = kind.startswith("sliding"), not kind.endswith("+shared")
        layer_heads = sliding_heads if sliding else full_heads
        linears, vectors = _attention(
            fields, layer_heads, has_own_cache=has_own_cache, has_values=sliding or not as_values
        )
        mlp, mlp_vectors, active = _feed_forward(fields, hidden, shared=not has_own_cache)
        if inputs:
            mlp += [
                Linear("per_layer_input_gate", inputs, hidden),
                Linear("per_layer_projection", hidden, inputs),
            ]
            mlp_vectors += hidden
        cache = (
            kv_cache(layer_heads, window if sliding else None)
            if has_own_cache
            else Cache(kind="none")
        )
        return Block(
            count=count,
            linears=(*linears, *mlp),
            vectors=vectors + mlp_vectors + 4 * hidden,
            cache=cache,
            active_experts=active,
        )

    named_kinds = [
        kind if index < first_shared else f"{kind}+shared" for index, kind in enumerate(kinds)
    ]
    longest = fields.integer("max_position_embeddings", default=131072)
    return Shape(
        hidden=hidden,
        vocab=fields.integer("vocab_size", default=262144),
        heads=heads,
        head_dim=head_dim,
        max_position=longest,
        tied=fields.flag("tie_word_embeddings", True),
        blocks=build_blocks(named_kinds, build_block),
        final_vectors=hidden,
        extra_parameters=_layer_input_parameters(fields, hidden, inputs, len(kinds)),
        rope_tables=rope_tables(fields, full_heads.head_dim, longest, local=True),
    )


def _attention(
    fields: Fields, heads: Heads, *, has_own_cache: bool, has_values: bool
) -> tuple[list[Linear], int]:
    """Return (projections of attention, number of parameters of the norms on query and key heads).
    A layer that uses the KV cache of another layer has no key and value projections.
    """
    bias = fields.flag("attention_bias", False)
    linears = [Linear("self_attn.q_proj", heads.query, heads.hidden, bias)]
    if has_own_cache:
        linears.append(Linear("self_attn.k_proj", heads.key, heads.hidden, bias))
    if has_own_cache and has_values:
        linears.append(Linear("self_attn.v_proj", heads.key, heads.hidden, bias))
    linears.append(Linear("self_attn.o_proj", heads.hidden, heads.query, bias))
    return linears, (2 if has_own_cache else 1) * heads.head_dim


def _feed_forward(fields: Fields, hidden: int, *, shared: bool) -> tuple[list[Linear], int, int]:
    """Return three values for the MLP and the experts of a layer: the linear maps, the number of
    parameters outside linear maps, and the number of active experts.
    """
    width_factor = 2 if shared and fields.flag("use_double_wide_mlp", False) else 1
    linears = gated_mlp(hidden, width_factor * fields.integer("intermediate_size", default=9216))
    if not fields.flag("enable_moe_block", False):
        return linears, 0, 0
    count = fields.integer("num_experts", high=MAX_EXPERTS)
    inner = fields.integer("moe_intermediate_size")
    linears += [
        Linear("router.proj", count, hidden),
        Linear("experts.gate_up_proj", 2 * inner, hidden, copies=count),
        Linear("experts.down_proj", hidden, inner, copies=count),
    ]
    active = fields.integer("top_k_experts", default=8, high=MAX_EXPERTS)
    return linears, 3 * hidden + hidden + count, active


def _layer_input_parameters(fields: Fields, hidden: int, inputs: int, layers: int) -> int:
    """The number of parameters of the per-layer embedding and of its projection."""
    if not inputs:
        return 0
    vocab = fields.integer("vocab_size_per_layer_input", default=262144)
    return vocab * layers * inputs + layers * inputs * hidden + inputs
