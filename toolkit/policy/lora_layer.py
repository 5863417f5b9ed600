"""Define a PEFT LoRA layer with a faster forward pass, ``adapted_linear``.

The faster forward pass is used only if it computes the same as PEFT's. The layer is registered
through PEFT's ``LoraConfig._register_custom_module`` (see PEFT's guide "Custom models"). The layer
has PEFT's names and parameters, and PEFT saves and merges it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import nn

from toolkit.policy.adapted_linear import adapted_linear, adapted_packed
from toolkit.policy.bnb_layers import PackedLinear4bit, compute_dtype_4bit
from toolkit.policy.tensor_parallel.layers import SplitLinear
from toolkit.policy.tensor_parallel.lora import SplitLoraLinear


class FastForward(nn.Module):
    """A forward pass for a PEFT layer that is faster and needs less memory under autocast.

    The faster pass is used if three conditions hold. The frozen layer has the dtype of autocast.
    Exactly one adapter is active. This adapter is plain LoRA and has another dtype than the frozen
    layer. In all other cases the layer uses the forward pass of its next base class, which is
    PEFT's class.
    """

    base_layer: Any
    lora_A: Any
    lora_B: Any
    scaling: Any
    disable_adapters: Any
    merged: Any
    active_adapters: Any
    lora_variant: Any
    lora_bias: Any
    lora_dropout: Any

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the output (..., out) of the adapted layer for the input ``x`` (..., in)."""
        name = None if args or kwargs else self._single_adapter()
        if name is None or not self._autocast_computes_all(x, name):
            out: torch.Tensor = super().forward(x, *args, **kwargs)
            return out
        base = self.base_layer
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        if compute_dtype_4bit(base) is not None:
            return adapted_packed(x, PackedLinear4bit(base), a, b, self.scaling[name])
        return adapted_linear(x, base.weight, base.bias, a, b, self.scaling[name])

    def _single_adapter(self) -> str | None:
        """Return the name of the active adapter if there is exactly one, and it is plain LoRA
        without dropout. Otherwise return None.
        """
        if self.disable_adapters or self.merged:
            return None
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1 or active[0] in self.lora_variant or self.lora_bias[active[0]]:
            return None
        drops_out = self.training and not isinstance(self.lora_dropout[active[0]], nn.Identity)
        return None if drops_out else str(active[0])

    def _autocast_computes_all(self, x: torch.Tensor, name: str) -> bool:
        """Return True if autocast would compute the base layer and the adapter in the dtype of
        ``x``.
        """
        device, weight = x.device.type, self.base_layer.weight
        compute_dtype = compute_dtype_4bit(self.base_layer) or weight.dtype
        return (
            torch.is_autocast_enabled(device)
            and x.dtype == compute_dtype == torch.get_autocast_dtype(device)
            and self.lora_A[name].weight.dtype != x.dtype
            and not weight.requires_grad
        )


class LoraLinear(FastForward, Linear):  # type: ignore[misc]  # PEFT ships no types that strict mode can use
    """``peft.tuners.lora.Linear`` with the faster forward pass."""


@cache
def _linear_4bit_class() -> Any:
    """Return a subclass of ``peft.tuners.lora.bnb.Linear4bit`` with the faster forward pass. The
    subclass is created on demand, because PEFT's class exists only if bitsandbytes is installed.
    """
    from peft.tuners.lora.bnb import Linear4bit  # noqa: PLC0415 - only with bitsandbytes

    return type("LoraLinear4bit", (FastForward, Linear4bit), {"__doc__": Linear4bit.__doc__})


def _make_layer_4bit(target: Any, base: Any, adapter_name: str, config: Any, kwargs: Any) -> Any:
    """Create a 4-bit layer with an adapter, with the same arguments as PEFT 0.21.2
    (``dispatch_bnb_4bit``).
    """
    base_kwargs = {
        "compute_dtype": base.compute_dtype,
        "compress_statistics": base.weight.compress_statistics,
        "quant_type": base.weight.quant_type,
    }
    return _linear_4bit_class()(target, adapter_name, config=config, **{**kwargs, **base_kwargs})


def use_fast_layers(config: Any) -> Any:
    """Change ``config`` (a ``peft.LoraConfig``) so that PEFT adapts linear layers with the classes
    of this module. Returns ``config``.
    """
    config._register_custom_module({nn.Linear: _make_lora_layer})
    return config


def _make_lora_layer(target: Any, adapter_name: str, *, config: Any, **kwargs: Any) -> Any:
    """Return a LoRA layer of this package for the layer ``target``, or None if PEFT must choose its
    own class.

    This package has LoRA layers for a plain ``nn.Linear``, a 4-bit linear layer, and a linear layer
    that is split over processes. PEFT must choose its own class for every other layer, such as
    another subclass of ``nn.Linear``, and for every layer that a hook of accelerate moves between
    devices.
    """
    base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
    if type(base) is SplitLinear:
        return SplitLoraLinear(target, adapter_name, config=config, **kwargs)
    if compute_dtype_4bit(base) is not None and kwargs.get("loaded_in_4bit"):
        needs_peft_class = hasattr(base, "_hf_hook") or kwargs.get("parameter_name") is not None
        return (
            None
            if needs_peft_class
            else _make_layer_4bit(target, base, adapter_name, config, kwargs)
        )
    is_plain_linear = type(base) is nn.Linear and not hasattr(base, "_hf_hook")
    if not is_plain_linear or kwargs.get("parameter_name") is not None:
        return None
    return LoraLinear(target, adapter_name, config=config, **kwargs)
