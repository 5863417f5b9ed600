"""Shapes of dense decoders: Llama and models with its architecture, Mistral, Qwen2/2.5, Qwen3,
SmolLM, Granite, OLMo 2/3, Phi-3/4.

Written from the configuration and modeling classes of transformers 5.17.
tests/contract/test_sizing_parameters.py compares the parameter counts with those of the classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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
from toolkit.sizing.model_blocks import Block, Linear

if TYPE_CHECKING:
    from toolkit.sizing.config_fields import Fields
    from toolkit.sizing.families.common import Heads, Shape


def _uniform_blocks(
    fields: Fields,
    heads: Heads,
    linears: list[Linear],
    vectors: int,
    window: int | None = None,
) -> tuple[Block, ...]:
    block = Block(
        count=layer_count(fields),
        linears=tuple(linears),
        vectors=vectors,
        cache=kv_cache(heads, window),
    )
    return (block,)


def llama(fields: Fields) -> Shape:
    """The shape of Llama 1-3, SmolLM, TinyLlama and DeepSeek's distilled Llama models."""
    heads = read_heads(fields)
    bias = fields.flag("attention_bias", False)
    mlp_bias = fields.flag("mlp_bias", False)
    inner = fields.integer("intermediate_size")
    linears = attention(heads, qkv_bias=bias, out_bias=bias)
    linears += gated_mlp(heads.hidden, inner, bias=mlp_bias)
    blocks = _uniform_blocks(fields, heads, linears, 2 * heads.hidden)
    return decoder(fields, heads, blocks, lora_tables=BOTH_TABLES)


def granite(fields: Fields) -> Shape:
    """The shape of Granite 3, which is Llama with four scalar multipliers."""
    return llama(fields)


def smollm3(fields: Fields) -> Shape:
    """The shape of SmolLM3, which is Llama without rotary embeddings on every fourth layer.
    Embedding and head are tied by default.
    """
    heads = read_heads(fields)
    bias = fields.flag("attention_bias", False)
    mlp_bias = fields.flag("mlp_bias", False)
    linears = attention(heads, qkv_bias=bias, out_bias=bias)
    linears += gated_mlp(heads.hidden, fields.integer("intermediate_size"), bias=mlp_bias)
    blocks = _uniform_blocks(fields, heads, linears, 2 * heads.hidden)
    return decoder(fields, heads, blocks, tied=True, lora_tables=("embedding",))


def mistral(fields: Fields) -> Shape:
    """The shape of Mistral. It has no biases. Every layer uses a sliding window if sliding_window
    is set.
    """
    heads = read_heads(fields)
    window = fields.integer("sliding_window", default=0, low=0) or None
    linears = attention(heads) + gated_mlp(heads.hidden, fields.integer("intermediate_size"))
    blocks = _uniform_blocks(fields, heads, linears, 2 * heads.hidden, window)
    return decoder(fields, heads, blocks)


def _qwen_window(fields: Fields) -> int | None:
    if not fields.flag("use_sliding_window", False):
        return None
    return fields.integer("sliding_window", default=0, low=0) or None


def _qwen_blocks(
    fields: Fields, heads: Heads, linears: list[Linear], vectors: int
) -> tuple[Block, ...]:
    window = _qwen_window(fields)
    first_windowed = fields.integer("max_window_layers", default=28, low=0)

    def default_kind(index: int) -> str:
        return "sliding_attention" if window and index >= first_windowed else "full_attention"

    def build_block(kind: str, count: int) -> Block:
        layer_window = window if kind == "sliding_attention" else None
        return Block(
            count=count,
            linears=tuple(linears),
            vectors=vectors,
            cache=kv_cache(heads, layer_window),
        )

    return build_blocks(layer_kinds(fields, default_kind), build_block)


def qwen2(fields: Fields) -> Shape:
    """The shape of Qwen2, Qwen2.5 and DeepSeek's distilled Qwen models. q, k and v always have
    biases, whatever the config contains.
    """
    heads = read_heads(fields)
    linears = attention(heads, qkv_bias=True)
    linears += gated_mlp(heads.hidden, fields.integer("intermediate_size"))
    blocks = _qwen_blocks(fields, heads, linears, 2 * heads.hidden)
    return decoder(fields, heads, blocks, max_position=32768)


def qwen3(fields: Fields) -> Shape:
    """The shape of Qwen3. head_dim is set separately (128 by default), and each query and key head
    has a norm.
    """
    heads = read_heads(fields, default_head_dim=128)
    bias = fields.flag("attention_bias", False)
    linears = attention(heads, qkv_bias=bias, out_bias=bias)
    linears += gated_mlp(heads.hidden, fields.integer("intermediate_size"))
    vectors = 2 * heads.hidden + 2 * heads.head_dim
    blocks = _qwen_blocks(fields, heads, linears, vectors)
    return decoder(fields, heads, blocks, lora_tables=BOTH_TABLES, max_position=32768)


def olmo2(fields: Fields) -> Shape:
    """The shape of OLMo 2. It has norms after attention and MLP, and norms over all query heads and
    all key heads together.
    """
    heads = read_heads(fields)
    bias = fields.flag("attention_bias", False)
    linears = attention(heads, qkv_bias=bias, out_bias=bias)
    linears += gated_mlp(heads.hidden, fields.integer("intermediate_size"))
    vectors = 2 * heads.hidden + heads.query + heads.key
    blocks = _uniform_blocks(fields, heads, linears, vectors)
    return decoder(fields, heads, blocks, lora_tables=("embedding",))


def olmo3(fields: Fields) -> Shape:
    """The shape of OLMo 3, which is OLMo 2 with three sliding-window layers for each full-attention
    layer.
    """
    heads = read_heads(fields)
    bias = fields.flag("attention_bias", False)
    linears = attention(heads, qkv_bias=bias, out_bias=bias)
    linears += gated_mlp(heads.hidden, fields.integer("intermediate_size"))
    vectors = 2 * heads.hidden + heads.query + heads.key
    window = fields.integer("sliding_window", default=4096)

    def default_kind(index: int) -> str:
        return "sliding_attention" if (index + 1) % 4 else "full_attention"

    def build_block(kind: str, count: int) -> Block:
        layer_window = window if kind == "sliding_attention" else None
        return Block(
            count=count,
            linears=tuple(linears),
            vectors=vectors,
            cache=kv_cache(heads, layer_window),
        )

    blocks = build_blocks(layer_kinds(fields, default_kind), build_block)
    return decoder(fields, heads, blocks, lora_tables=("embedding",))


def phi3(fields: Fields) -> Shape:
    """The shape of Phi-3 and Phi-4, whose checkpoints have fused qkv and gate/up tensors."""
    heads = read_heads(fields)
    inner = fields.integer("intermediate_size")
    linears = [
        Linear("self_attn.qkv_proj", heads.query + 2 * heads.key, heads.hidden),
        Linear("self_attn.o_proj", heads.hidden, heads.query),
        Linear("mlp.gate_up_proj", 2 * inner, heads.hidden),
        Linear("mlp.down_proj", heads.hidden, inner),
    ]
    window = fields.integer("sliding_window", default=0, low=0) or None
    if window is not None and window >= fields.integer("max_position_embeddings", default=4096):
        window = None  # a window as long as the context has no effect
    blocks = _uniform_blocks(fields, heads, linears, 2 * heads.hidden, window)
    return decoder(fields, heads, blocks, lora_tables=BOTH_TABLES, max_position=4096)
