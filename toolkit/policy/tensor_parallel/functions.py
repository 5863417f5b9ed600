"""Communicate between the processes that share a model. The functions support gradients.

In this module, a *whole* tensor is one whose value and gradient are the same in all processes of
the group. A *part* is a tensor that each process computes for itself. Most functions return their
input unchanged in one direction (forward or backward), and sum over the group in the other
direction.

Each function allocates its memory before it calls ``together.check_peers``. So memory cannot
run out between that call and the collective call of torch.distributed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from toolkit.engine.mesh import current_mesh
from toolkit.engine.shards import shard_of
from toolkit.engine.together import check_peers

if TYPE_CHECKING:
    from collections.abc import Iterable


class _EnterParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return whole.view_as(whole)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        # all_reduce writes to its input, and autograd may use the original gradient elsewhere. So
        # copy the gradient first.
        grad = grad.clone(memory_format=torch.contiguous_format)
        check_peers()
        distributed.all_reduce(grad, group=ctx.group)
        return grad, None


class _LeaveParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, group: Any) -> torch.Tensor:
        del ctx
        whole = part.clone(memory_format=torch.contiguous_format)
        check_peers()
        distributed.all_reduce(whole, group=group)
        return whole

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        del ctx
        return grad, None


class _JoinLast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, part: torch.Tensor, group: Any, start: int, width: int, total: int
    ) -> torch.Tensor:
        ctx.start, ctx.length = start, part.shape[-1]
        padded = torch.nn.functional.pad(part, (0, width - part.shape[-1])).contiguous()
        parts = [torch.empty_like(padded) for _ in range(distributed.get_world_size(group))]
        check_peers()
        distributed.all_gather(parts, padded, group=group)
        return torch.cat(parts, -1)[..., :total]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grad.narrow(-1, ctx.start, ctx.length), None, None, None, None


def copy_to_parallel_region(whole: torch.Tensor, group: Any) -> torch.Tensor:
    """Return the whole tensor ``whole`` unchanged. Each process then computes its part from the
    result. The backward pass sums the gradients of all processes.
    """
    out: torch.Tensor = _EnterParts.apply(whole, group)  # type: ignore[no-untyped-call]
    return out


def reduce_from_parallel_region(part: torch.Tensor, group: Any) -> torch.Tensor:
    """Return the sum of ``part`` over all processes, which is a whole tensor. In the backward pass
    every process gets the gradient of the sum.
    """
    out: torch.Tensor = _LeaveParts.apply(part, group)  # type: ignore[no-untyped-call]
    return out


def gather_last_dimension(
    part: torch.Tensor, group: Any, *, start: int, width: int, total: int
) -> torch.Tensor:
    """Concatenate the parts of all processes along the last dimension. Each part has at most
    ``width`` entries, and the result has ``total`` entries. This process's part begins at index
    ``start`` of the result.
    """
    out: torch.Tensor = _JoinLast.apply(part, group, start, width, total)  # type: ignore[no-untyped-call]
    return out


def max_over_group(part: torch.Tensor, group: Any) -> torch.Tensor:
    """Return the elementwise maximum of ``part`` over the group. It has no gradient."""
    found = part.detach().clone()
    check_peers()
    distributed.all_reduce(found, op=distributed.ReduceOp.MAX, group=group)
    return found


@torch.no_grad()
def clip_split_grad_norm(parameters: Iterable[torch.Tensor], most: float) -> torch.Tensor:
    """Scale the gradients so that their norm over all processes is at most ``most``. Returns the
    norm before scaling.

    The function does the same as ``torch.nn.utils.clip_grad_norm_``, for parameters that are split
    over processes. A parameter that is not split counts once, although every process has it.
    """
    known = [one for one in parameters if one.grad is not None]
    if not known:
        return torch.zeros(())
    squares = torch.zeros(2, dtype=torch.float32, device=known[0].device)
    for one in known:
        assert one.grad is not None
        own = torch.linalg.vector_norm(one.grad, dtype=torch.float32) ** 2
        squares[0 if shard_of(one) else 1] += own
    shared = current_mesh()
    if shared is not None:
        shared.all_reduce(squares[:1])
    norm = squares.sum().sqrt()
    factor = (most / (norm + 1e-6)).clamp(max=1.0)
    for one in known:
        assert one.grad is not None
        one.grad.mul_(factor.to(one.grad.device))
    return norm
