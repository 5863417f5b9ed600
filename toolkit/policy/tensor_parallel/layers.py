"""Define linear layers, an embedding and a head (output layer) that are split over processes. Each
process has a part of the weight.

``in_features`` and ``out_features`` are the sizes of this part. ``full_in_features`` and
``full_out_features`` are the sizes of the whole layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import embedding, linear

from toolkit.policy.tensor_parallel.functions import (
    copy_to_parallel_region,
    gather_last_dimension,
    reduce_from_parallel_region,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from toolkit.engine.mesh import Mesh
    from toolkit.engine.shards import WeightSplit


MESH_ATTRIBUTE = "toolkit_mesh"
"""The name of the attribute that stores the ``Mesh`` of a Hugging Face model that is split."""


def mesh_of(model: PreTrainedModel) -> Mesh | None:
    """Return the mesh over which ``model`` is split, or None if it is not split. ``model`` must be
    the Hugging Face model itself, without PEFT's wrapper.
    """
    mesh: Mesh | None = getattr(model, MESH_ATTRIBUTE, None)
    return mesh


class SplitLinear(nn.Linear):
    """A linear layer that is split by rows or by columns of its weight. If it is split by rows, its
    output is a part of the whole output. If it is split by columns, its input is a part of the
    whole input.

    ``input_is_copied`` is True if the parent module has already applied ``copy_to_parallel_region``
    to the input.
    """

    def __init__(self, layer: nn.Linear, split: WeightSplit, mesh: Mesh) -> None:
        splits_rows = split.style == "rows"
        super().__init__(
            layer.in_features if splits_rows else split.length,
            split.length if splits_rows else layer.out_features,
            bias=layer.bias is not None,
            device="meta",
            dtype=layer.weight.dtype,
        )
        self.full_in_features, self.full_out_features = layer.in_features, layer.out_features
        self.split, self.mesh, self.input_is_copied = split, mesh, False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., in) to (..., part of out) if the layer is split by rows. Map (..., part of in)
        to (..., out) if it is split by columns.
        """
        return self.reduce_output(linear(self.copy_input(x), self.weight, self.local_bias))

    @property
    def local_bias(self) -> torch.Tensor | None:
        """The bias that this process adds, or None. If the bias is not split, only the first
        process adds it.
        """
        if self.split.style == "rows" or self.mesh.is_first:
            return self.bias
        return None

    def copy_input(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input ``x`` for the computation in this process. If the weight (out, in) is
        split by rows, the backward pass sums the gradient of ``x`` over the group.
        """
        if self.split.style == "columns" or self.input_is_copied:
            return x
        return copy_to_parallel_region(x, self.mesh.group)

    def reduce_output(self, out: torch.Tensor) -> torch.Tensor:
        """Return the layer's output for the next layer. ``out`` is the result of this process. If
        the weight (out, in) is split by columns, the results of all processes are summed. If it is
        split by rows, ``out`` is returned unchanged.
        """
        return (
            reduce_from_parallel_region(out, self.mesh.group)
            if self.split.style == "columns"
            else out
        )


class SplitEmbedding(nn.Embedding):
    """An embedding that is split by rows. This process has ``split.length`` rows, beginning with
    row ``split.start``. If ``scale`` is not None, the embedded tokens are multiplied by ``scale``.
    """

    def __init__(self, layer: nn.Embedding, split: WeightSplit, mesh: Mesh) -> None:
        super().__init__(split.length, layer.embedding_dim, device="meta", dtype=layer.weight.dtype)
        self.split, self.mesh = split, mesh
        self.scale: torch.Tensor | None = getattr(layer, "embed_scale", None)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the embedded tokens (..., hidden). They are the same in all processes."""
        local_ids = ids - self.split.start
        is_local = (local_ids >= 0) & (local_ids < self.split.length)
        embedded = embedding(local_ids.where(is_local, 0), self.weight)
        embedded = reduce_from_parallel_region(
            embedded * is_local.unsqueeze(-1).to(embedded.dtype), self.mesh.group
        )
        return embedded if self.scale is None else embedded * self.scale.to(embedded)


class SplitHead(nn.Linear):
    """An output layer that is split by rows. This process has ``split.length`` rows, beginning with
    row ``split.start``. ``width`` is the number of rows per process, which includes the padding of
    the vocabulary.
    """

    def __init__(self, layer: nn.Linear, split: WeightSplit, width: int, mesh: Mesh) -> None:
        super().__init__(
            layer.in_features,
            split.length,
            bias=layer.bias is not None,
            device="meta",
            dtype=layer.weight.dtype,
        )
        self.split, self.width, self.mesh = split, width, mesh

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits (..., vocabulary) of the whole vocabulary, in every process. Training
        calls ``local_logits`` instead.
        """
        return gather_last_dimension(
            self.local_logits(hidden),
            self.mesh.group,
            start=self.split.start,
            width=self.width,
            total=self.split.total,
        )

    def local_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits (..., part of the vocabulary) of this process."""
        return linear(copy_to_parallel_region(hidden, self.mesh.group), self.weight, self.bias)


def copy_input_once(module: nn.Module, mesh: Mesh) -> None:
    """Apply ``copy_to_parallel_region`` once to the input of ``module``, instead of once in each
    linear layer whose weight (out, in) is split by rows.

    Each ``copy_to_parallel_region`` costs one sum over the group in the backward pass. So q, k and
    v need one sum together instead of three, and gate and up need one instead of two.

    The function does this only if all linear layers of ``module`` are split, so that no other layer
    uses the input.
    """
    layers = [child for child in module.children() if isinstance(child, nn.Linear)]
    split_layers = [child for child in layers if isinstance(child, SplitLinear)]
    row_split_layers = [child for child in split_layers if child.split.style == "rows"]
    if not row_split_layers or len(split_layers) != len(layers):
        return
    for layer in row_split_layers:
        layer.input_is_copied = True
    module.register_forward_pre_hook(_CopyInputHook(mesh), with_kwargs=True)


class _CopyInputHook:
    """A hook that applies ``copy_to_parallel_region`` to the input of a module. The input is the
    first positional argument, or the keyword ``hidden_states``.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        del module
        if args:
            return (copy_to_parallel_region(args[0], self.mesh.group), *args[1:]), kwargs
        copied = copy_to_parallel_region(kwargs["hidden_states"], self.mesh.group)
        return args, {**kwargs, "hidden_states": copied}
