"""A linear layer with its LoRA update as one function of autograd.

PEFT's own forward (0.21.2) casts the input up to the float32 of the adapter, autocast casts it down
again, and the update is scaled and added in passes of their own. Autograd then keeps a copy of the
input for every adapted layer. Here the input is kept once, as it came (q, k and v share it), the
update is accumulated by the matrix product that makes it, and the gradient of the input is one
product accumulated onto the other.

    y = x W^T + bias + s (x A^T) B^T        (LoRA: arXiv 2106.09685)

Letters: T rows (tokens), I in, O out, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear


def adapted_linear(
    x: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None,
    a_RI: torch.Tensor,
    b_OR: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """(..., O) in the dtype of ``x`` (..., I), which is also that of the frozen weight and bias.

    The adapter may have another dtype: it is computed with in that of ``x``, as under autocast, and
    its gradients come in its own.
    """
    out: torch.Tensor = _AdaptedLinear.apply(  # type: ignore[no-untyped-call]  # untyped upstream
        x, weight_OI, bias_O, a_RI, b_OR, scaling
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
        # Views keep x itself alive, not a copy of it.
        ctx.save_for_backward(x_TI, weight_OI, a_RI, b_OR, hidden_TR)
        ctx.scaling, ctx.shape = scaling, x.shape
        return out_TO.view(*x.shape[:-1], weight_OI.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TI, weight_OI, a_RI, b_OR, hidden_TR = ctx.saved_tensors
        grad_TO = grad.reshape(-1, grad.shape[-1])
        grad_hidden_TR = (grad_TO @ b_OR.to(grad.dtype)).mul_(ctx.scaling)
        grad_a = grad_b = grad_x = None
        if ctx.needs_input_grad[3]:
            grad_a = (grad_hidden_TR.T @ x_TI).to(a_RI.dtype)
        if ctx.needs_input_grad[4]:
            grad_b = (grad_TO.T @ hidden_TR).to(b_OR.dtype).mul_(ctx.scaling)
        if ctx.needs_input_grad[0]:
            grad_TI = grad_TO @ weight_OI
            grad_x = grad_TI.addmm_(grad_hidden_TR, a_RI.to(grad.dtype)).view(ctx.shape)
        return grad_x, None, None, grad_a, grad_b, None
