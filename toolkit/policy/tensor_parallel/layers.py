"""Define linear layers, an embedding and a head (output layer) that are split over processes. Each
process has a part of the weight.

``in_features`` and ``out_features`` are the sizes of this part. ``whole_in`` and ``whole_out`` are
the sizes of the whole layer.
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
    from toolkit.engine.mesh import Mesh
    from toolkit.engine.shards import WeightSplit


MESH_ATTRIBUTE = "toolkit_mesh"
"""The name of the attribute that stores the ``Mesh`` of a Hugging Face model that is split."""


def mesh_of(model: Any) -> Mesh | None:
    """Return the mesh over which ``model`` is split, or None if it is not split. ``model`` must be
    the Hugging Face model itself, without PEFT's wrapper.
    """
    found: Mesh | None = getattr(model, MESH_ATTRIBUTE, None)
    return found


class SplitLinear(nn.Linear):
    """A linear layer that is split by rows or by columns of its weight. If it is split by rows, its
    output is a part of the whole output. If it is split by columns, its input is a part of the
    whole input.

    ``entered`` is True if the parent module has already applied ``copy_to_parallel_region`` to the
    input.
    """

    def __init__(self, layer: nn.Linear, cut: WeightSplit, mesh: Mesh) -> None:
        rows = cut.style == "rows"
        super().__init__(
            layer.in_features if rows else cut.length,
            cut.length if rows else layer.out_features,
            bias=layer.bias is not None,
            device="meta",
            dtype=layer.weight.dtype,
        )
        self.whole_in, self.whole_out = layer.in_features, layer.out_features
        self.cut, self.mesh, self.entered = cut, mesh, False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., in) to (..., part of out) if the layer is split by rows. Map (..., part of in)
        to (..., out) if it is split by columns.
        """
        return self.leave(linear(self.enter(x), self.weight, self.own_bias))

    @property
    def own_bias(self) -> torch.Tensor | None:
        """The bias that this process adds, or None. If the bias is not split, only the first
        process adds it.
        """
        if self.cut.style == "rows" or self.mesh.is_first:
            return self.bias
        return None

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input ``x`` for the computation in this process. If the layer is split by
        rows, the backward pass sums the gradient of ``x`` over the group.
        """
        if self.cut.style == "columns" or self.entered:
            return x
        return copy_to_parallel_region(x, self.mesh.group)

    def leave(self, out: torch.Tensor) -> torch.Tensor:
        """Return the layer's output for the next layer. ``out`` is the result of this process. If
        the weight (out, in) is split by columns, the results of all processes are summed. If it is
        split by rows, ``out`` is returned unchanged.
        """
        return (
            reduce_from_parallel_region(out, self.mesh.group)
            if self.cut.style == "columns"
            else out
        )


class SplitEmbedding(nn.Embedding):
    """An embedding that is split by rows. This process has ``cut.length`` rows, beginning with row
    ``cut.start``. If ``scale`` is not None, the embedded tokens are multiplied by ``scale``.
    """

    def __init__(self, layer: nn.Embedding, cut: WeightSplit, mesh: Mesh) -> None:
        super().__init__(cut.length, layer.embedding_dim, device="meta", dtype=layer.weight.dtype)
        self.cut, self.mesh = cut, mesh
        self.scale: torch.Tensor | None = getattr(layer, "embed_scale", None)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the embedded tokens (..., hidden). They are the same in all processes."""
        own = ids - self.cut.start
        here = (own >= 0) & (own < self.cut.length)
        found = embedding(own.where(here, 0), self.weight)
        found = reduce_from_parallel_region(
            found * here.unsqueeze(-1).to(found.dtype), self.mesh.group
        )
        return found if self.scale is None else found * self.scale.to(found)


class SplitHead(nn.Linear):
    """An output layer that is split by rows. This process has ``cut.length`` rows, beginning with
    row ``cut.start``. ``width`` is the number of rows per process, which includes the padding of
    the vocabulary.
    """

    def __init__(self, layer: nn.Linear, cut: WeightSplit, width: int, mesh: Mesh) -> None:
        super().__init__(
            layer.in_features,
            cut.length,
            bias=layer.bias is not None,
            device="meta",
            dtype=layer.weight.dtype,
        )
        self.cut, self.width, self.mesh = cut, width, mesh

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits (..., vocabulary) of the whole vocabulary, in every process. Training
        calls ``part`` instead.
        """
        return gather_last_dimension(
            self.part(hidden),
            self.mesh.group,
            start=self.cut.start,
            width=self.width,
            total=self.cut.total,
        )

    def part(self, hidden: torch.Tensor) -> torch.Tensor:
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
    split = [child for child in layers if isinstance(child, SplitLinear)]
    rows = [child for child in split if child.cut.style == "rows"]
    if not rows or len(split) != len(layers):
        return
    for layer in rows:
        layer.entered = True
    module.register_forward_pre_hook(_Enter(mesh), with_kwargs=True)


class _Enter:
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
        entered = copy_to_parallel_region(kwargs["hidden_states"], self.mesh.group)
        return args, {**kwargs, "hidden_states": entered}
