"""Mark parameters that are split over the processes of a group, and join their parts.

With tensor parallelism some parameters are split. Each process of the group then has only one part
of such a parameter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from toolkit.base.errors import DefectError
from toolkit.engine.mesh import current_mesh

SHARD_ATTRIBUTE = "_toolkit_shard"
"""The name of the parameter attribute in which ``mark_as_shard`` stores the ``Shard`` of a part."""


SplitStyle = Literal["rows", "columns", "whole"]


@dataclass(frozen=True, slots=True)
class WeightSplit:
    """How the weight of a layer is split over the processes of a group.

    ``style`` is ``"rows"``, ``"columns"``, or ``"whole"`` for a weight that is not split. This
    process has ``length`` of the ``total`` rows or columns, beginning at index ``start``. If
    ``repeated`` is True, other processes have the same rows, because there are fewer KV heads than
    processes.
    """

    style: SplitStyle
    start: int = 0
    length: int = 0
    total: int = 0
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class Shard:
    """The mark on a parameter that is only one part of a split parameter. The whole parameter has
    size ``total`` along dimension ``dim``. Each process has an equal part of it.
    """

    dim: int
    total: int


def mark_as_shard(parameter: torch.Tensor, dim: int, total: int) -> None:
    """Mark ``parameter`` as this process's part of a parameter of size ``total`` along ``dim``."""
    setattr(parameter, SHARD_ATTRIBUTE, Shard(dim, total))


def shard_of(parameter: Any) -> Shard | None:
    """Return the ``Shard`` with which ``mark_as_shard`` marked a parameter. None means that the
    parameter is not split, so every process of the group has the whole parameter.
    """
    shard: Shard | None = getattr(parameter, SHARD_ATTRIBUTE, None)
    return shard


@torch.no_grad()
def gather_full_tensor(tensor: torch.Tensor, like: object = None) -> torch.Tensor:
    """Join the parts that the processes have, and return the whole tensor. ``tensor`` is this
    process's part. Every process of the group must call this function.

    The mark (``Shard``) on the parameter ``like`` says how ``tensor`` is split. If ``like`` is
    None, the mark on ``tensor`` itself says so. Without a mark, ``tensor`` is not split, and it is
    returned unchanged.
    """
    shard, mesh = shard_of(tensor if like is None else like), current_mesh()
    if shard is None:
        return tensor
    if mesh is None:
        raise DefectError(
            "the parameter is split over several processes, but the engine that "
            "connects these processes is closed"
        )
    return torch.cat(mesh.all_gather(tensor.detach()), dim=shard.dim)


def local_shard(tensor: torch.Tensor, like: object) -> torch.Tensor:
    """Return this process's part of the whole ``tensor``, split like the parameter ``like``."""
    shard, mesh = shard_of(like), current_mesh()
    if shard is None:
        return tensor
    if mesh is None:
        raise DefectError(
            "the parameter is split over several processes, but the engine that "
            "connects these processes is closed"
        )
    if tensor.dim() == 0 or tensor.shape[shard.dim] != shard.total:
        return tensor  # the shape is wrong, and the caller reports that
    length = shard.total // mesh.size
    view = tensor.narrow(shard.dim, mesh.rank * length, length)
    # Return a contiguous copy. Fused optimizers need contiguous memory, and a view would keep the
    # whole tensor in memory.
    return view.clone(memory_format=torch.contiguous_format)


def full_shape(parameter: Any) -> torch.Size:
    """Return the shape of the whole parameter, even if ``parameter`` is only one part of it."""
    shape, shard = list(parameter.shape), shard_of(parameter)
    if shard is not None:
        shape[shard.dim] = shard.total
    return torch.Size(shape)
