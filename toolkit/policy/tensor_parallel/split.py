"""Replace the layers of a Hugging Face model by split layers. A split layer has only this process's
part of the weight. The layers are replaced before the model has weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from toolkit.base.errors import UnsupportedError
from toolkit.config.parallel import model_problem
from toolkit.policy.tensor_parallel.layers import (
    MESH_ATTRIBUTE,
    SplitEmbedding,
    SplitHead,
    SplitLinear,
    copy_input_once,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from toolkit.engine.mesh import Mesh
    from toolkit.engine.shards import WeightSplit

WHERE = "model.tensor_parallel_size"


class LayerSplits(Protocol):
    """The interface of an object that knows this process's part of each layer. The trainer uses the
    same parts as the engine of this process.
    """

    def layer_split(self, name: str, out_features: int) -> WeightSplit:
        """Return this process's part of the linear layer ``name``. Raises UnsupportedError if the
        engine splits the layer in a way that the trainer does not support.
        """

    def vocabulary_split(self, name: str) -> tuple[WeightSplit, int]:
        """Return this process's part of the embedding or head ``name``. Return also the number of
        rows per process, which includes padding rows.
        """


def split_model(model: PreTrainedModel, splits: LayerSplits, mesh: Mesh) -> None:
    """Replace the layers of ``model`` (on the meta device) by this process's parts of them.

    Raises:
        UnsupportedError: the engine splits a layer in a way that the trainer does not support.
    """
    problem = model_problem(model.config.to_dict())
    if problem is not None:
        raise UnsupportedError(problem, where=WHERE, fix="set tensor_parallel_size: 1")
    _split_vocabulary(model, splits, mesh)
    for path, layer in list(model.named_modules()):
        if type(layer) is nn.Linear:
            split = splits.layer_split(path, layer.out_features)
            if split.style != "whole":
                _replace_module(model, path, SplitLinear(layer, split, mesh))
    for layer in model.modules():
        copy_input_once(layer, mesh)
        _set_kv_groups(layer)
    setattr(model, MESH_ATTRIBUTE, mesh)


def _split_vocabulary(model: PreTrainedModel, splits: LayerSplits, mesh: Mesh) -> None:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = head.weight is embedding.weight
    paths = {id(module): path for path, module in model.named_modules()}
    is_supported = type(embedding) is nn.Embedding or hasattr(embedding, "embed_scale")
    if not is_supported or type(head) is not nn.Linear:
        raise UnsupportedError(
            f"an embedding of type {type(embedding).__name__} with a head of type "
            f"{type(head).__name__} cannot be split",
            where=WHERE,
            fix="set tensor_parallel_size: 1",
        )
    split, width = splits.vocabulary_split(paths[id(embedding)])
    new_embedding = SplitEmbedding(embedding, split, mesh)
    if not is_tied:
        split, width = splits.vocabulary_split(paths[id(head)])
    new_head = SplitHead(head, split, width, mesh)
    if is_tied:
        new_head.weight = new_embedding.weight
    _replace_module(model, paths[id(embedding)], new_embedding)
    _replace_module(model, paths[id(head)], new_head)


def _set_kv_groups(layer: nn.Module) -> None:
    """Set the number of query heads per KV head in this process. If several processes have the same
    KV head, this number is smaller than in the whole model.
    """
    query, key = getattr(layer, "q_proj", None), getattr(layer, "k_proj", None)
    if not isinstance(query, SplitLinear) or not isinstance(key, SplitLinear):
        return
    if hasattr(layer, "num_key_value_groups"):
        groups: Any = query.out_features // key.out_features
        layer.num_key_value_groups = groups


def _replace_module(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)
