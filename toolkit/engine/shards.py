"""Parameters of which each process of a group holds a part: a mark on the parameter says which, and
parts are put together again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from toolkit.base.errors import DefectError
from toolkit.engine.mesh import mesh

MARK = "_toolkit_shard"
"""Attribute of an adapter's parameter that is a part of a larger one."""


Style = Literal["rows", "columns", "whole"]


@dataclass(frozen=True, slots=True)
class Cut:
    """How a layer is cut: the ``rows`` or ``columns`` of its weight from ``start`` on, ``length``
    of ``total``, are here. ``repeated``: other processes hold the same ones (there are more of them
    than KV heads).
    """

    style: Style
    start: int = 0
    length: int = 0
    total: int = 0
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class Shard:
    """A mark on a parameter: along ``dim`` this process holds its equal part of ``total``."""

    dim: int
    total: int


def mark(parameter: torch.Tensor, dim: int, total: int) -> None:
    """Note that ``parameter`` is this process's part of ``total`` along ``dim``."""
    setattr(parameter, MARK, Shard(dim, total))


def shard_of(parameter: Any) -> Shard | None:
    """The mark on a parameter; None for one that every process of the group holds whole."""
    found: Shard | None = getattr(parameter, MARK, None)
    return found


@torch.no_grad()
def gather_parts(tensor: torch.Tensor, like: Any = None) -> torch.Tensor:
    """The whole of a part: of ``tensor``, cut as the parameter ``like`` (itself) is. Every process
    of the group calls it. What is whole already is returned as it is.
    """
    shard, shared = shard_of(tensor if like is None else like), mesh()
    if shard is None:
        return tensor
    if shared is None:
        raise DefectError("a part of a parameter, and its engine is closed")
    return torch.cat(shared.gather(tensor.detach()), dim=shard.dim)


def part(tensor: torch.Tensor, like: Any) -> torch.Tensor:
    """The part of a whole ``tensor`` that this process holds of the parameter ``like``."""
    shard, shared = shard_of(like), mesh()
    if shard is None:
        return tensor
    if shared is None:
        raise DefectError("a part of a parameter, and its engine is closed")
    if tensor.dim() == 0 or tensor.shape[shard.dim] != shard.total:
        return tensor  # for the caller to find that it is no such tensor
    length = shard.total // shared.size
    own = tensor.narrow(shard.dim, shared.rank * length, length)
    # A copy: fused optimizers read memory in order, and the whole is not to be kept.
    return own.clone(memory_format=torch.contiguous_format)


def whole_shape(parameter: Any) -> torch.Size:
    """The shape of the whole of a parameter."""
    shape, shard = list(parameter.shape), shard_of(parameter)
    if shard is not None:
        shape[shard.dim] = shard.total
    return torch.Size(shape)
