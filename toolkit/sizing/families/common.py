"""Code that all architecture families share: the linear maps of attention and MLP, the kinds of
layers, and the class ``Shape`` that each family function returns.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolkit.base.errors import InputError
from toolkit.sizing.config_fields import MAX_LAYERS
from toolkit.sizing.families.rope import rope_tables, rotary_columns
from toolkit.sizing.model_blocks import Block, Cache, Linear

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from toolkit.sizing.config_fields import Fields
    from toolkit.sizing.model_blocks import RopeTable, Scores


# The embedding tables that a vLLM model class lists in ``embedding_modules``.
BOTH_TABLES = ("embedding", "head")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The part of a ModelSpec that the architecture determines."""

    hidden: int
    vocab: int
    heads: int
    head_dim: int
    max_position: int
    tied: bool
    blocks: tuple[Block, ...]
    final_vectors: int
    extra_parameters: int = 0
    head_bias: bool = False
    lora_tables: tuple[str, ...] = ()
    rope_tables: tuple[RopeTable, ...] = ()
    scores: Scores = "fused"
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """The counts and sizes of attention heads."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def query(self) -> int:
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        return self.kv_heads * self.head_dim


def read_heads(fields: Fields, *, default_head_dim: int | None = None) -> Heads:
    """Read the attention heads with the defaults of transformers: if config.json does not set them,
    num_key_value_heads = num_attention_heads and head_dim = hidden_size // num_attention_heads.
    """
    hidden = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", default=heads)
    if fields.has("head_dim") or default_head_dim is None:
        head_dim = fields.integer("head_dim", default=hidden // heads, low=0)
    else:
        head_dim = default_head_dim
    if head_dim < 1 or heads % kv_heads:
        raise InputError(
            f"{heads} heads, {kv_heads} KV heads and hidden size {hidden} are inconsistent",
            where=fields.where,
            fix="check num_attention_heads, num_key_value_heads and head_dim",
        )
    return Heads(hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=head_dim)


def attention(heads: Heads, *, qkv_bias: bool = False, out_bias: bool = False) -> list[Linear]:
    """The q, k, v and o projections of an attention layer."""
    return [
        Linear("self_attn.q_proj", heads.query, heads.hidden, qkv_bias),
        Linear("self_attn.k_proj", heads.key, heads.hidden, qkv_bias),
        Linear("self_attn.v_proj", heads.key, heads.hidden, qkv_bias),
        Linear("self_attn.o_proj", heads.hidden, heads.query, out_bias),
    ]


def gated_mlp(hidden: int, inner: int, *, bias: bool = False, prefix: str = "mlp") -> list[Linear]:
    """The gate, up and down projections of a gated MLP (arXiv 2002.05202)."""
    return [
        Linear(f"{prefix}.gate_proj", inner, hidden, bias),
        Linear(f"{prefix}.up_proj", inner, hidden, bias),
        Linear(f"{prefix}.down_proj", hidden, inner, bias),
    ]


def layer_count(fields: Fields) -> int:
    """Return ``num_hidden_layers``. Raises InputError if it is not an integer within bounds."""
    return fields.integer("num_hidden_layers", high=MAX_LAYERS)


def layer_kinds(fields: Fields, default: Callable[[int], str]) -> tuple[str, ...]:
    """Return the kind of each layer: the list ``layer_types`` of config.json, or ``default(index)``
    for each layer if config.json has no such list. Raises InputError if the list has a wrong
    length.
    """
    count = layer_count(fields)
    layer_types = fields.items("layer_types", str)
    if layer_types is None:
        return tuple(default(index) for index in range(count))
    if len(layer_types) < count:
        raise InputError(
            f"layer_types has {len(layer_types)} entries for {count} layers",
            where=fields.where,
            fix="use the model's own config.json",
        )
    return layer_types[:count]


def kv_cache(heads: Heads, window: int | None = None) -> Cache:
    """Return the KV cache of an attention layer. ``window`` is in tokens; None means that the layer
    attends to all tokens.
    """
    return Cache(
        kind="full" if window is None else "sliding",
        key_elements=heads.key,
        value_elements=heads.key,
        window=window,
    )


def build_blocks(
    kinds: Sequence[str], build_block: Callable[[str, int], Block]
) -> tuple[Block, ...]:
    """Return one Block for each kind of layer. ``count`` is the number of layers of this kind."""
    return tuple(build_block(kind, count) for kind, count in Counter(kinds).items())


def decoder(
    fields: Fields,
    heads: Heads,
    blocks: tuple[Block, ...],
    *,
    tied: bool = False,
    lora_tables: tuple[str, ...] = (),
    max_position: int = 2048,
) -> Shape:
    """The shape of a decoder: an embedding, ``blocks`` and a head. ``tied`` and ``max_position``
    are the defaults that apply if config.json does not set them.
    """
    longest = fields.integer("max_position_embeddings", default=max_position)
    columns = rotary_columns(fields, heads.head_dim)
    return Shape(
        hidden=heads.hidden,
        vocab=fields.integer("vocab_size"),
        heads=heads.heads,
        head_dim=heads.head_dim,
        max_position=longest,
        tied=fields.flag("tie_word_embeddings", tied),
        blocks=blocks,
        final_vectors=heads.hidden,
        lora_tables=lora_tables,
        rope_tables=rope_tables(fields, columns, longest),
    )
