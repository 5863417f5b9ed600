"""The steps between the processes that share a model, with their gradients.

Each is the identity for one direction and a sum for the other: what is whole is the same in all
processes of the group, value and gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed


class _EnterParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return whole.view_as(whole)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)  # autograd may use it elsewhere
        distributed.all_reduce(grad, group=ctx.group)
        return grad, None


class _LeaveParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, group: Any) -> torch.Tensor:
        del ctx
        whole = part.clone(memory_format=torch.contiguous_format)
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
        distributed.all_gather(parts, padded, group=group)
        return torch.cat(parts, -1)[..., :total]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grad.narrow(-1, ctx.start, ctx.length), None, None, None, None


def enter_parts(whole: torch.Tensor, group: Any) -> torch.Tensor:
    """A whole tensor before each process computes its part: the gradients of the parts add up."""
    out: torch.Tensor = _EnterParts.apply(whole, group)  # type: ignore[no-untyped-call]
    return out


def leave_parts(part: torch.Tensor, group: Any) -> torch.Tensor:
    """The sum of what each process has computed; its gradient is that of each summand."""
    out: torch.Tensor = _LeaveParts.apply(part, group)  # type: ignore[no-untyped-call]
    return out


def join_last(
    part: torch.Tensor, group: Any, *, start: int, width: int, total: int
) -> torch.Tensor:
    """The parts (..., at most ``width``) of all processes side by side, cut to ``total``; this one
    begins at ``start``.
    """
    out: torch.Tensor = _JoinLast.apply(part, group, start, width, total)  # type: ignore[no-untyped-call]
    return out


def largest(part: torch.Tensor, group: Any) -> torch.Tensor:
    """The largest of the group, place by place; without a gradient."""
    found = part.detach().clone()
    distributed.all_reduce(found, op=distributed.ReduceOp.MAX, group=group)
    return found
