"""Run mixture-of-experts models on a CPU engine with LoRA.

If LoRA is on, vLLM 0.31 computes all expert layers with Triton kernels, even if no expert has an
adapter. Triton kernels do not run on a CPU. vLLM also has a CPU kernel for experts, but it repacks
the expert weights, and the trainer could not share the repacked weights.

This module computes expert layers in plain torch on the loaded weights. It registers its layer
through vLLM's interface for custom layers (``CustomOp.register_oot``). The computation is slow but
exact, and is meant for machines without a GPU.
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

REPLACED_CLASS = "UnquantizedFusedMoEMethod"
"""The name of vLLM's class that ``TorchExperts`` replaces."""

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


class TorchExperts(UnquantizedFusedMoEMethod):  # type: ignore[misc]  # vllm ships no types
    """A subclass of the class with which vLLM computes unquantized experts. If vLLM has chosen its
    Triton backend, this subclass computes the experts in plain torch instead.
    """

    def process_weights_after_loading(self, layer: Any) -> None:
        """Keep the loaded weights unchanged, and raise an error for options that ``forward_cpu``
        does not support.

        Raises:
            UnsupportedError: the layer has biases, an activation that is not in ``ACTIVATIONS``, or
                router weights that are applied to the layer's input.
        """
        super().process_weights_after_loading(layer)
        if self.unquantized_backend != UnquantizedMoeBackend.TRITON:
            return
        is_supported = layer.activation.value in ACTIVATIONS
        if not is_supported or self.moe.has_bias or layer.apply_router_weight_on_input:
            raise UnsupportedError(
                "with LoRA, an expert layer runs only on a GPU if it has biases, applies the "
                "router weights to its input, or has an unsupported activation (the activation "
                f"of this layer is {layer.activation.value})",
                where="model.fast_inference",
                fix="set `fast_inference: false` (in a run file: `runtime.engine: "
                "transformers`) on this machine",
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
        """Return (T, H): for each of T tokens the weighted sum of the outputs of its K experts.

        ``x`` is (T, H), where H is the hidden size. ``topk_weights`` and ``topk_ids`` are (T, K).
        With E experts of the intermediate size I, ``layer.w13_weight`` is (E, 2 I, H), with the
        rows of gate_proj before the rows of up_proj. ``layer.w2_weight`` is (E, H, I).
        """
        if self.unquantized_backend != UnquantizedMoeBackend.TRITON:
            output: torch.Tensor = super().forward_cpu(
                layer, x, topk_weights, topk_ids, *args, **kwargs
            )
            return output
        activation = ACTIVATIONS[layer.activation.value]
        sum_TH = x.new_zeros(x.shape)
        for expert in sorted(set(topk_ids.flatten().tolist())):
            tokens, choices = (topk_ids == expert).nonzero(as_tuple=True)
            gate_NI, up_NI = functional.linear(x[tokens], layer.w13_weight[expert]).chunk(2, -1)
            output_NH = functional.linear(activation(gate_NI) * up_NI, layer.w2_weight[expert])
            weight_N1 = topk_weights[tokens, choices].unsqueeze(1)
            sum_TH.index_add_(0, tokens, (output_NH * weight_N1).to(x.dtype))
        return sum_TH


def register() -> None:
    """Make vLLM use ``TorchExperts`` for experts in this process. A second call has no effect."""
    if op_registry_oot.get(REPLACED_CLASS) is not TorchExperts:
        CustomOp.register_oot(name=REPLACED_CLASS)(TorchExperts)
