"""Find which part of each Hugging Face layer the engine of this process has (tensor parallelism).

vLLM's layer classes record how a layer is split (``ColumnParallelLinear``, ``RowParallelLinear``,
``VocabParallelEmbedding``; written for vLLM 0.25.1 and 0.31.0). This module reads only these
records, so it works for every architecture.
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
from toolkit.engine.mesh import current_mesh
from toolkit.engine.shards import WeightSplit

if TYPE_CHECKING:
    from torch import nn

CONFIG_KEY = "model.tensor_parallel_size"


class EngineSplits:
    """Finds how vLLM's model ``module`` splits its layers over the processes. The methods take the
    Hugging Face name of a layer.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def layer_split(self, name: str, out_features: int) -> WeightSplit:
        """Return how the engine splits the linear layer ``name``."""
        return find_weight_split(self.module, name, out_features)

    def vocabulary_split(self, name: str) -> tuple[WeightSplit, int]:
        """Return which rows of the table ``name`` (an embedding or a head) belong to this process.
        Return also the number of rows per process, which includes padding rows.
        """
        return find_vocabulary_split(self.module, name)


def find_weight_split(module: nn.Module, name: str, out_features: int) -> WeightSplit:
    """Return how vLLM's model ``module`` splits the linear layer with the Hugging Face name
    ``name``.

    Raises:
        UnsupportedError: the engine does not have this layer, or the trainer cannot reproduce how
            the engine's layer is split.
    """
    mesh = current_mesh()
    assert mesh is not None
    layer, part = _find_engine_layer(module, name)
    if isinstance(layer, RowParallelLinear):
        length = int(layer.input_size_per_partition)
        return WeightSplit("columns", mesh.rank * length, length, int(layer.input_size))
    if isinstance(layer, ColumnParallelLinear):
        sizes = list(getattr(layer, "output_partition_sizes", []))
        if part >= len(sizes) or (part == 0 and len(sizes) == 1 and layer.gather_output):
            raise UnsupportedError(
                f"the engine splits the layer {name} in a way that the trainer does not support",
                where=CONFIG_KEY,
                fix="set tensor_parallel_size: 1",
            )
        length = int(sizes[part])
        copies = max(length * mesh.size // out_features, 1)
        start = mesh.rank // copies * length
        return WeightSplit("rows", start, length, out_features, repeated=copies > 1)
    if isinstance(layer, ReplicatedLinear):
        return WeightSplit("whole")
    raise UnsupportedError(
        f"the engine implements {name} as a {type(layer).__name__}, and the trainer cannot split "
        "this class of layer",
        where=CONFIG_KEY,
        fix="set tensor_parallel_size: 1",
    )


def find_vocabulary_split(module: nn.Module, name: str) -> tuple[WeightSplit, int]:
    """Return which rows of the embedding or head ``name`` this process has, and the number of rows
    per process including padding rows.

    Raises:
        UnsupportedError: the engine does not have this layer, or does not split it by vocabulary.
    """
    layer, _ = _find_engine_layer(module, name)
    if not isinstance(layer, VocabParallelEmbedding):
        raise UnsupportedError(
            f"the engine implements {name} as a {type(layer).__name__}, which is not split by "
            "vocabulary",
            where=CONFIG_KEY,
            fix="set tensor_parallel_size: 1",
        )
    shard_indices = layer.shard_indices
    start, end = int(shard_indices.org_vocab_start_index), int(shard_indices.org_vocab_end_index)
    split = WeightSplit("rows", start, end - start, int(layer.org_vocab_size))
    return split, int(layer.num_embeddings_per_partition)


def _find_engine_layer(module: nn.Module, name: str) -> tuple[Any, int]:
    """Return vLLM's layer for the Hugging Face layer ``name``, and an index. If vLLM fuses several
    Hugging Face layers into one layer, the index is the position of ``name`` among them. Otherwise
    the index is 0.
    """
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
        f"the engine has no layer for {name}", where=CONFIG_KEY, fix="set tensor_parallel_size: 1"
    )
