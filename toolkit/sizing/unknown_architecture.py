"""Describe an unknown architecture for sizing. The shapes of the matrices come from the safetensors
headers, which are grouped by the tensor names and layer numbers. The attention comes from the usual
keys of config.json.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING

from toolkit.base.errors import UnsupportedError
from toolkit.sizing.families.common import Shape, kv_cache, read_heads
from toolkit.sizing.families.rope import rope_tables
from toolkit.sizing.model_blocks import Block, Linear

if TYPE_CHECKING:
    from toolkit.sizing.config_fields import Fields
    from toolkit.sizing.headers import StoredTensor, StoredWeights
    from toolkit.sizing.model_blocks import Cache

_LAYER = re.compile(r"^(?:.*\.)?(?:layers|h|blocks|layer)\.(\d{1,4})\.(.+)$")
_EMBEDDING = re.compile(
    r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.weight$"
)
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output)\.weight$")
REQUIRED_KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def shape_from_headers(fields: Fields, stored: StoredWeights) -> Shape:
    """Return a Shape with the tensors of the safetensors headers. Raises UnsupportedError if
    config.json lacks necessary keys; the message names these keys.
    """
    if missing := [key for key in REQUIRED_KEYS if not fields.has(key)]:
        raise UnsupportedError(
            f"the architecture is unknown, and its config.json has no {', '.join(missing)}",
            where=fields.where,
            fix="add these keys with their values to a copy of config.json",
        )
    heads = read_heads(fields)
    layers: dict[int, dict[str, StoredTensor]] = defaultdict(dict)
    other_elements = 0
    embedding = head = None
    for name, tensor in stored.tensors.items():
        if match := _LAYER.match(name):
            layers[int(match[1])][match[2]] = tensor
        elif _EMBEDDING.search(name):
            embedding = tensor
        elif _HEAD.search(name):
            head = tensor
        else:
            other_elements += tensor.elements
    hidden = heads.hidden
    vocab = fields.integer("vocab_size")
    if embedding is not None and len(embedding.shape) == 2:
        vocab, hidden = embedding.shape
    window = fields.integer("sliding_window", default=0, low=0) or None
    max_position = fields.integer("max_position_embeddings", "n_positions", default=2048)
    blocks = tuple(
        _block(tensors, count, kv_cache(heads, window))
        for tensors, count in _group_equal_layers(layers)
    )
    return Shape(
        hidden=hidden,
        vocab=vocab,
        heads=heads.heads,
        head_dim=heads.head_dim,
        max_position=max_position,
        tied=head is None or fields.flag("tie_word_embeddings", False),
        blocks=blocks,
        final_vectors=other_elements,
        rope_tables=rope_tables(fields, heads.head_dim, max_position),
    )


def _group_equal_layers(
    layers: dict[int, dict[str, StoredTensor]],
) -> list[tuple[dict[str, StoredTensor], int]]:
    """Group the layers with equal tensors; return (tensors, number of layers) of each group."""
    groups: dict[tuple[tuple[str, tuple[int, ...]], ...], tuple[dict[str, StoredTensor], int]] = {}
    for tensors in layers.values():
        key = tuple(sorted((name, tensor.shape) for name, tensor in tensors.items()))
        first, count = groups.get(key, (tensors, 0))
        groups[key] = (first, count + 1)
    return list(groups.values())


def _block(tensors: dict[str, StoredTensor], count: int, cache: Cache) -> Block:
    linears = []
    vectors = 0
    experts: dict[tuple[str, int, int], int] = defaultdict(int)
    for name, tensor in tensors.items():
        if len(tensor.shape) == 2 and name.endswith(".weight"):
            generic = re.sub(r"\.experts\.\d+\.", ".experts.", name.removesuffix(".weight"))
            experts[generic, tensor.shape[0], tensor.shape[1]] += 1
        elif len(tensor.shape) == 3:
            experts[name.removesuffix(".weight"), tensor.shape[1], tensor.shape[2]] += tensor.shape[
                0
            ]
        else:
            vectors += tensor.elements
    for (name, out_features, in_features), copies in experts.items():
        linears.append(Linear(name, out_features, in_features, copies=copies))
    return Block(
        count=count, linears=tuple(linears), vectors=vectors, cache=cache, active_experts=1
    )
