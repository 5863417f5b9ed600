"""Communicate between the processes that share a model. The functions support gradients.

In this module, a *whole* tensor is one whose value and gradient are the same in all processes of
the group. A *part* is a tensor that each process computes for itself. Most functions return their
input unchanged in one direction (forward or backward), and sum over the group in the other
direction.

Each function allocates its memory before it calls ``oom_agreement.check_peers``. So memory cannot
run out between that call and the collective call of torch.distributed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from toolkit.engine.mesh import current_mesh
from toolkit.engine.oom_agreement import check_peers
from toolkit.engine.shards import shard_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.distributed import ProcessGroup


class _CopyToParallelRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
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


class _ReduceFromParallelRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
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


class _GatherLastDimension(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, part: torch.Tensor, group: ProcessGroup | None, start: int, width: int, total: int
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


def copy_to_parallel_region(whole: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
    """Return the whole tensor ``whole`` unchanged. Each process then computes its part from the
    result. The backward pass sums the gradients of all processes.
    """
    out: torch.Tensor = _CopyToParallelRegion.apply(whole, group)  # type: ignore[no-untyped-call]
    return out


def reduce_from_parallel_region(part: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
    """Return the sum of ``part`` over all processes, which is a whole tensor. In the backward pass
    every process gets the gradient of the sum.
    """
    out: torch.Tensor = _ReduceFromParallelRegion.apply(part, group)  # type: ignore[no-untyped-call]
    return out


def gather_last_dimension(
    part: torch.Tensor, group: ProcessGroup | None, *, start: int, width: int, total: int
) -> torch.Tensor:
    """Concatenate the parts of all processes along the last dimension. Each part has at most
    ``width`` entries, and the result has ``total`` entries. This process's part begins at index
    ``start`` of the result.
    """
    out: torch.Tensor = _GatherLastDimension.apply(part, group, start, width, total)  # type: ignore[no-untyped-call]
    return out


def max_over_group(part: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
    """Return the elementwise maximum of ``part`` over the group. It has no gradient."""
    maximum = part.detach().clone()
    check_peers()
    distributed.all_reduce(maximum, op=distributed.ReduceOp.MAX, group=group)
    return maximum


@torch.no_grad()
def clip_split_grad_norm(parameters: Iterable[torch.Tensor], max_norm: float) -> torch.Tensor:
    """Scale the gradients so that their norm over all processes is at most ``max_norm``. Returns
    the norm before scaling.

    The function does the same as ``torch.nn.utils.clip_grad_norm_``, for parameters that are split
    over processes. A parameter that is not split counts once, although every process has it.
    """
    with_gradients = [parameter for parameter in parameters if parameter.grad is not None]
    if not with_gradients:
        return torch.zeros(())
    squares = torch.zeros(2, dtype=torch.float32, device=with_gradients[0].device)
    for parameter in with_gradients:
        assert parameter.grad is not None
        square = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32) ** 2
        squares[0 if shard_of(parameter) else 1] += square
    model_mesh = current_mesh()
    if model_mesh is not None:
        model_mesh.all_reduce(squares[:1])
    norm = squares.sum().sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for parameter in with_gradients:
        assert parameter.grad is not None
        parameter.grad.mul_(factor.to(parameter.grad.device))
    return norm
