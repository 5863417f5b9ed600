"""Compute a linear layer with its LoRA update as one autograd function.

PEFT's own forward pass (0.21.2) casts the input to float32, the dtype of the adapter, and autocast
then casts it back. PEFT scales the update in one pass over memory and adds it to the output in
another. Autograd keeps a copy of the input for every adapted layer.

The function in this module keeps only the original input, which the q, k and v projections share.
One fused operation (``addmm``) computes the update and adds it to the output. The backward pass
uses the same operation for the gradient of the input.

    y = x W^T + bias + s (x A^T) B^T        (LoRA: arXiv 2106.09685)

The suffixes of tensor names are the dimensions: T tokens (rows), I input features, O output
features, R rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn.functional import linear

if TYPE_CHECKING:
    from collections.abc import Callable


def adapted_linear(
    x: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None,
    a_RI: torch.Tensor,
    b_OR: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Return the output (..., O) of the adapted layer for the input ``x`` (..., I). Input, output,
    frozen weight and bias have the same dtype.

    The adapter (``a_RI`` and ``b_OR``) may have another dtype. It is cast to the dtype of ``x`` for
    the computation, as under autocast. The gradients of the adapter have the adapter's own dtype.
    """
    out: torch.Tensor = _AdaptedLinear.apply(  # type: ignore[no-untyped-call]  # untyped upstream
        x, weight_OI, bias_O, a_RI, b_OR, scaling
    )
    return out


class PackedBase(Protocol):
    """A frozen layer with a packed (4-bit) weight, which is unpacked for each matrix product."""

    def matmul(self, x_TI: torch.Tensor) -> torch.Tensor:
        """Return x W^T + bias (T, O), in the dtype of ``x_TI``."""

    def unpacked_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the unpacked weight (O, I) as a new tensor of ``dtype``."""


def adapted_packed(
    x: torch.Tensor, base: PackedBase, a_RI: torch.Tensor, b_OR: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Return the same output as ``adapted_linear``, for a base layer with a packed weight. The
    weight is unpacked in the forward pass and again in the backward pass, so that no unpacked copy
    is kept between the two passes.
    """
    out: torch.Tensor = _AdaptedPacked.apply(  # type: ignore[no-untyped-call]  # untyped upstream
        x, base, a_RI, b_OR, scaling
    )
    return out


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913 - autograd sees only tensors that are arguments themselves
        ctx: Any,
        x: torch.Tensor,
        weight_OI: torch.Tensor,
        bias_O: torch.Tensor | None,
        a_RI: torch.Tensor,
        b_OR: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        x_TI = x.reshape(-1, x.shape[-1])
        hidden_TR = x_TI @ a_RI.to(x.dtype).T
        out_TO = linear(x_TI, weight_OI, bias_O)
        out_TO.addmm_(hidden_TR, b_OR.to(x.dtype).T, alpha=scaling)
        # ``x_TI`` is a view, so this saves ``x`` itself and not a copy.
        ctx.save_for_backward(x_TI, weight_OI, a_RI, b_OR, hidden_TR)
        ctx.scaling, ctx.shape = scaling, x.shape
        return out_TO.view(*x.shape[:-1], weight_OI.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TI, weight_OI, a_RI, b_OR, hidden_TR = ctx.saved_tensors
        needs_grad = (ctx.needs_input_grad[0], *ctx.needs_input_grad[3:5])
        grad_x, grad_a, grad_b = _gradients(
            ctx, grad, (x_TI, a_RI, b_OR, hidden_TR), lambda _: weight_OI, needs_grad
        )
        return grad_x, None, None, grad_a, grad_b, None


class _AdaptedPacked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        base: PackedBase,
        a_RI: torch.Tensor,
        b_OR: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        x_TI = x.reshape(-1, x.shape[-1])
        hidden_TR = x_TI @ a_RI.to(x.dtype).T
        out_TO = base.matmul(x_TI)
        out_TO.addmm_(hidden_TR, b_OR.to(x.dtype).T, alpha=scaling)
        ctx.save_for_backward(x_TI, a_RI, b_OR, hidden_TR)
        ctx.base, ctx.scaling, ctx.shape = base, scaling, x.shape
        return out_TO.view(*x.shape[:-1], out_TO.shape[-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needs_grad = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:4])
        grad_x, grad_a, grad_b = _gradients(
            ctx, grad, ctx.saved_tensors, ctx.base.unpacked_weight, needs_grad
        )
        return grad_x, None, grad_a, grad_b, None


def _gradients(
    ctx: Any,
    grad: torch.Tensor,
    saved_tensors: tuple[torch.Tensor, ...],
    get_weight: Callable[[torch.dtype], torch.Tensor],
    needs_grad: tuple[bool, ...],
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of the input, of A and of B. ``needs_grad`` has one flag per gradient,
    in this order. A gradient is None if its flag is False.
    """
    x_TI, a_RI, b_OR, hidden_TR = saved_tensors
    grad_TO = grad.reshape(-1, grad.shape[-1])
    grad_hidden_TR = _scale_in_place(grad_TO @ b_OR.to(grad.dtype), ctx.scaling)
    grad_a = grad_b = grad_x = None
    if needs_grad[1]:
        grad_a = (grad_hidden_TR.T @ x_TI).to(a_RI.dtype)
    if needs_grad[2]:
        grad_b = _scale_in_place((grad_TO.T @ hidden_TR).to(b_OR.dtype), ctx.scaling)
    if needs_grad[0]:
        grad_TI = grad_TO @ get_weight(grad.dtype)
        grad_x = grad_TI.addmm_(grad_hidden_TR, a_RI.to(grad.dtype)).view(ctx.shape)
    return grad_x, grad_a, grad_b


def _scale_in_place(tensor: torch.Tensor, scaling: float) -> torch.Tensor:
    """Multiply ``tensor`` by ``scaling`` in place. If ``scaling`` is 1, no kernel is started."""
    return tensor if scaling == 1 else tensor.mul_(scaling)
