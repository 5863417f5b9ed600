"""Mixtures of experts on a CPU engine with LoRA.

vLLM 0.31 takes LoRA beside experts through Triton kernels alone, also where no expert has an
adapter, and a CPU has none. Its own CPU kernel would repack the experts, which nothing could then
share. So here is the layer in plain torch over the weights as they were loaded, put in through
vLLM's seam for such layers (``CustomOp.register_oot``): slow, exact, and for machines without a
GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.nn import functional
from vllm.model_executor.custom_op import CustomOp, op_registry_oot
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)

from toolkit.base.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

NAME = "UnquantizedFusedMoEMethod"
"""vLLM's class, and so the name that ours is registered under."""

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


class TorchExperts(UnquantizedFusedMoEMethod):  # type: ignore[misc]  # vllm ships no types
    """vLLM's experts without quantization; computed here where its choice fell on Triton."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Leave the weights as they are, and refuse what is not computed here.

        Raises:
            UnsupportedError: another activation, biases, or weights on the input.
        """
        super().process_weights_after_loading(layer)
        if self.unquantized_backend != UnquantizedMoeBackend.TRITON:
            return
        known = layer.activation.value in ACTIVATIONS
        if not known or self.moe.has_bias or layer.apply_router_weight_on_input:
            raise UnsupportedError(
                f"experts of this kind ({layer.activation.value}) with LoRA run on a GPU only",
                where="model.fast_inference",
                fix="set fast_inference: false on this machine (runtime.engine: transformers)",
            )

    def forward_cpu(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """(T, H): the weighted sum of what each token's K experts make of it.

        ``x`` (T, H), ``topk_weights`` and ``topk_ids`` (T, K); ``layer.w13_weight`` (E, 2 I, H)
        holds gate over up, ``layer.w2_weight`` is (E, H, I).
        """
        if self.unquantized_backend != UnquantizedMoeBackend.TRITON:
            found: torch.Tensor = super().forward_cpu(
                layer, x, topk_weights, topk_ids, *args, **kwargs
            )
            return found
        activation = ACTIVATIONS[layer.activation.value]
        sum_TH = x.new_zeros(x.shape)
        for expert in sorted(set(topk_ids.flatten().tolist())):
            tokens, places = (topk_ids == expert).nonzero(as_tuple=True)
            gate_NI, up_NI = functional.linear(x[tokens], layer.w13_weight[expert]).chunk(2, -1)
            made_NH = functional.linear(activation(gate_NI) * up_NI, layer.w2_weight[expert])
            weight_N1 = topk_weights[tokens, places].unsqueeze(1)
            sum_TH.index_add_(0, tokens, (made_NH * weight_N1).to(x.dtype))
        return sum_TH


def register() -> None:
    """Have vLLM make ``TorchExperts`` in this process. A second call changes nothing."""
    if op_registry_oot.get(NAME) is not TorchExperts:
        CustomOp.register_oot(name=NAME)(TorchExperts)
