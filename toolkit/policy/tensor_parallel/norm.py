"""The norm of a gradient of which each process holds a part."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from toolkit.engine.mesh import mesh
from toolkit.engine.shards import shard_of

if TYPE_CHECKING:
    from collections.abc import Iterable


@torch.no_grad()
def clip_whole(parameters: Iterable[torch.Tensor], most: float) -> torch.Tensor:
    """Scale the gradients so that their norm over all processes is at most ``most``; returns the
    norm before. What every process holds whole counts once. As ``torch.nn.utils.clip_grad_norm_``.
    """
    known = [one for one in parameters if one.grad is not None]
    if not known:
        return torch.zeros(())
    squares = torch.zeros(2, dtype=torch.float32, device=known[0].device)
    for one in known:
        assert one.grad is not None
        own = torch.linalg.vector_norm(one.grad, dtype=torch.float32) ** 2
        squares[0 if shard_of(one) else 1] += own
    shared = mesh()
    if shared is not None:
        shared.add(squares[:1])
    norm = squares.sum().sqrt()
    factor = (most / (norm + 1e-6)).clamp(max=1.0)
    for one in known:
        assert one.grad is not None
        one.grad.mul_(factor.to(one.grad.device))
    return norm
