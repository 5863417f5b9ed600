"""Find the part of a Hugging Face layer that the engine of this process has.

vLLM's own layer records how it is split (``ColumnParallelLinear``, ``RowParallelLinear``,
``VocabParallelEmbedding``, read at 0.25.1 and 0.31.0). This module does not depend on an
architecture.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from toolkit.base.errors import UnsupportedError
from toolkit.engine.live_weights import engine_name, packed_modules
from toolkit.engine.mesh import mesh
from toolkit.engine.shards import Cut

if TYPE_CHECKING:
    from torch import nn

WHERE = "model.tensor_parallel_size"


class EngineCuts:
    """How the layers of vLLM's ``module`` are split, by their Hugging Face names."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def of_layer(self, name: str, out_features: int) -> Cut:
        """Return the result of ``cut_of`` for the linear layer ``name``."""
        return cut_of(self.module, name, out_features)

    def of_table(self, name: str) -> tuple[Cut, int]:
        """Return the result of ``vocabulary_cut`` for the embedding or head ``name``."""
        return vocabulary_cut(self.module, name)


def cut_of(module: nn.Module, name: str, out_features: int) -> Cut:
    """How vLLM's ``module`` splits the Hugging Face linear layer ``name``.

    Raises:
        UnsupportedError: the engine does not have this layer, or has another kind of layer there.
    """
    shared = mesh()
    assert shared is not None
    layer, part = _layer_of(module, name)
    if isinstance(layer, RowParallelLinear):
        length = int(layer.input_size_per_partition)
        return Cut("columns", shared.rank * length, length, int(layer.input_size))
    if isinstance(layer, ColumnParallelLinear):
        sizes = list(getattr(layer, "output_partition_sizes", []))
        if part >= len(sizes) or (part == 0 and len(sizes) == 1 and layer.gather_output):
            raise UnsupportedError(f"the engine's layer of {name} is cut otherwise", where=WHERE)
        length = int(sizes[part])
        copies = max(length * shared.size // out_features, 1)
        start = shared.rank // copies * length
        return Cut("rows", start, length, out_features, repeated=copies > 1)
    if isinstance(layer, ReplicatedLinear):
        return Cut("whole")
    raise UnsupportedError(
        f"the engine's layer of {name} is a {type(layer).__name__}, which the trainer does not"
        " follow when it is split",
        where=WHERE,
        fix="tensor_parallel_size: 1",
    )


def vocabulary_cut(module: nn.Module, name: str) -> tuple[Cut, int]:
    """(the rows of the embedding or head ``name`` in this process, the number of rows of each
    process including padding).
    """
    layer, _ = _layer_of(module, name)
    if not isinstance(layer, VocabParallelEmbedding):
        raise UnsupportedError(f"the engine's {name} is a {type(layer).__name__}", where=WHERE)
    held = layer.shard_indices
    start, end = int(held.org_vocab_start_index), int(held.org_vocab_end_index)
    cut = Cut("rows", start, end - start, int(layer.org_vocab_size))
    return cut, int(layer.num_embeddings_per_partition)


def _layer_of(module: nn.Module, name: str) -> tuple[Any, int]:
    """(vLLM's layer, the index of the part in it) for the Hugging Face layer ``name``."""
    target = engine_name(module, name)
    parent, _, leaf = target.rpartition(".")
    candidates = [(target, 0)]
    for fused, parts in packed_modules(module).items():
        if leaf in parts and len(parts) > 1:
            candidates.append((f"{parent}.{fused}" if parent else fused, list(parts).index(leaf)))
    for path, part in candidates:
        try:
            layer = module.get_submodule(path)
        except AttributeError:
            continue
        return getattr(layer, "base_layer", layer), part
    raise UnsupportedError(
        f"the engine has no layer for {name}", where=WHERE, fix="tensor_parallel_size: 1"
    )
