"""Shapes of Gemma 2 and 3. They have four norms per layer, and some layers use sliding windows
while the others use full attention. Gemma 3 has many class defaults that config files omit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.base.errors import InputError
from toolkit.sizing.config_fields import Fields
from toolkit.sizing.families.common import (
    Shape,
    attention,
    build_blocks,
    gated_mlp,
    kv_cache,
    layer_kinds,
    read_heads,
)
from toolkit.sizing.families.rope import rope_tables
from toolkit.sizing.model_blocks import Block

if TYPE_CHECKING:
    from collections.abc import Mapping

# Gemma3TextConfig's own defaults (transformers 5.17), which published files rely on.
GEMMA3_DEFAULTS: Mapping[str, object] = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
}
GEMMA2_DEFAULTS: Mapping[str, object] = {
    "vocab_size": 256000,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "sliding_window": 4096,
}


def _with_defaults(fields: Fields, defaults: Mapping[str, object]) -> Fields:
    set_values = {key: value for key, value in fields.values.items() if value is not None}
    return Fields({**defaults, **set_values}, fields.where)


def _gemma(fields: Fields, *, pattern: int, head_norms: bool, capped: bool = False) -> Shape:
    heads = read_heads(fields)
    bias = fields.flag("attention_bias", False)
    linears = attention(heads, qkv_bias=bias, out_bias=bias)
    linears += gated_mlp(heads.hidden, fields.integer("intermediate_size"))
    vectors = 4 * heads.hidden + (2 * heads.head_dim if head_norms else 0)
    window = fields.integer("sliding_window")

    def default_kind(index: int) -> str:
        return "sliding_attention" if (index + 1) % pattern else "full_attention"

    def build_block(kind: str, count: int) -> Block:
        layer_window = window if kind == "sliding_attention" else None
        return Block(
            count=count,
            linears=tuple(linears),
            vectors=vectors,
            cache=kv_cache(heads, layer_window),
        )

    max_position = fields.integer("max_position_embeddings")
    return Shape(
        hidden=heads.hidden,
        vocab=fields.integer("vocab_size"),
        heads=heads.heads,
        head_dim=heads.head_dim,
        max_position=max_position,
        tied=fields.flag("tie_word_embeddings", True),
        blocks=build_blocks(layer_kinds(fields, default_kind), build_block),
        final_vectors=heads.hidden,
        rope_tables=rope_tables(fields, heads.head_dim, max_position, local=head_norms),
        scores="capped" if capped else "fused",
    )


def gemma2(fields: Fields) -> Shape:
    """The shape of Gemma 2. Every other layer uses a sliding window. The attention scores are
    soft-capped unless attn_logit_softcapping is null in config.json.
    """
    complete = _with_defaults(fields, GEMMA2_DEFAULTS)
    capped = fields.values.get("attn_logit_softcapping", 50.0) is not None
    return _gemma(complete, pattern=2, head_norms=False, capped=capped)


def gemma3_text(fields: Fields) -> Shape:
    """The shape of the text-only Gemma 3. It has five sliding-window layers for each full-attention
    layer, and a norm on each query and key head.
    """
    complete = _with_defaults(fields, GEMMA3_DEFAULTS)
    pattern = complete.integer("sliding_window_pattern", "_sliding_window_pattern", high=64)
    return _gemma(complete, pattern=pattern, head_norms=True)


def gemma3(fields: Fields) -> Shape:
    """The shape of Gemma 3 with its vision tower (SigLIP) and projector. Raises InputError if the
    config has no text_config.
    """
    text = fields.section("text_config")
    if text is None:
        raise InputError(
            "text_config is missing", where=fields.where, fix="use the model's own config.json"
        )
    shape = gemma3_text(text)
    vision = fields.section("vision_config") or Fields({}, fields.where)
    tower = _siglip_parameters(vision)
    projector = vision.integer("hidden_size", default=768) * (shape.hidden + 1)
    # As in transformers, the outer config decides whether embeddings are tied.
    tied = fields.flag("tie_word_embeddings", shape.tied)
    return Shape(
        hidden=shape.hidden,
        vocab=shape.vocab,
        heads=shape.heads,
        head_dim=shape.head_dim,
        max_position=shape.max_position,
        tied=tied,
        blocks=shape.blocks,
        final_vectors=shape.final_vectors,
        extra_parameters=tower + projector,
        rope_tables=shape.rope_tables,
        notes=("the vision tower's weights are counted, but not the memory for images",),
    )


def _siglip_parameters(vision: Fields) -> int:
    """The number of parameters of SiglipVisionModel (arXiv 2303.15343). The pooling head is
    included unless vision_use_head is false.
    """
    hidden = vision.integer("hidden_size", default=768)
    inner = vision.integer("intermediate_size", default=3072)
    layers = vision.integer("num_hidden_layers", default=12)
    image = vision.integer("image_size", default=224)
    patch = vision.integer("patch_size", default=16)
    channels = vision.integer("num_channels", default=3)
    positions = (image // patch) ** 2
    embeddings = channels * patch * patch * hidden + hidden + positions * hidden
    layer = 4 * (hidden * hidden + hidden) + 2 * hidden * inner + inner + hidden + 4 * hidden
    total = embeddings + layers * layer + 2 * hidden
    if vision.flag("vision_use_head", True):
        probe = hidden + 3 * hidden * hidden + 3 * hidden + hidden * hidden + hidden
        total += probe + 2 * hidden + 2 * hidden * inner + inner + hidden
    return total
