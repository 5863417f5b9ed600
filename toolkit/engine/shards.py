"""Mark parameters of which each process of a group has only a part, and put the parts together
again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from toolkit.base.errors import DefectError
from toolkit.engine.mesh import mesh

MARK = "_toolkit_shard"
"""Attribute of an adapter's parameter that is a part of a larger parameter: its ``Shard``."""


Style = Literal["rows", "columns", "whole"]


@dataclass(frozen=True, slots=True)
class Cut:
    """How a layer is split: this process has the ``rows`` or ``columns`` of its weight from
    ``start`` on, ``length`` of ``total``. ``repeated``: other processes have the same ones, because
    there are fewer KV heads than processes.
    """

    style: Style
    start: int = 0
    length: int = 0
    total: int = 0
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class Shard:
    """The mark on a parameter: this process has its equal part of ``total`` along ``dim``."""

    dim: int
    total: int


def mark(parameter: torch.Tensor, dim: int, total: int) -> None:
    """Mark ``parameter`` as this process's part of ``total`` along ``dim``."""
    setattr(parameter, MARK, Shard(dim, total))


def shard_of(parameter: Any) -> Shard | None:
    """The mark on a parameter; None if every process of the group has the whole parameter."""
    found: Shard | None = getattr(parameter, MARK, None)
    return found


@torch.no_grad()
def gather_parts(tensor: torch.Tensor, like: Any = None) -> torch.Tensor:
    """The whole tensor of which ``tensor`` is this process's part. ``tensor`` is split as the
    parameter ``like`` is, or, for None, by its own mark. Every process of the group must call
    this function. A tensor that is not split is returned unchanged.
    """
    shard, shared = shard_of(tensor if like is None else like), mesh()
    if shard is None:
        return tensor
    if shared is None:
        raise DefectError("a part of a parameter, and its engine is closed")
    return torch.cat(shared.gather(tensor.detach()), dim=shard.dim)


def part(tensor: torch.Tensor, like: Any) -> torch.Tensor:
    """This process's part of the whole ``tensor``, which is split as the parameter ``like`` is."""
    shard, shared = shard_of(like), mesh()
    if shard is None:
        return tensor
    if shared is None:
        raise DefectError("a part of a parameter, and its engine is closed")
    if tensor.dim() == 0 or tensor.shape[shard.dim] != shard.total:
        return tensor  # its shape is wrong, which the caller reports
    length = shard.total // shared.size
    own = tensor.narrow(shard.dim, shared.rank * length, length)
    # This is a copy, because fused optimizers read memory in order, and the whole tensor should be
    # freed.
    return own.clone(memory_format=torch.contiguous_format)


def whole_shape(parameter: Any) -> torch.Size:
    """The shape of the whole parameter, of which ``parameter`` may be a part."""
    shape, shard = list(parameter.shape), shard_of(parameter)
    if shard is not None:
        shape[shard.dim] = shard.total
    return torch.Size(shape)
