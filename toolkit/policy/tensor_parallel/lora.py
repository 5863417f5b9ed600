"""PEFT's LoRA layer on a layer that is split.

Cut by rows, A is whole in every process and B is cut with the layer; cut by columns, A is cut and B
is whole. What is whole takes part in every process's share of the output, so its gradients add up.
B of a KV head that several processes hold is whole in all of them, and each uses its rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import Linear
from torch import nn
from torch.nn.functional import linear

from toolkit.base.errors import UnsupportedError
from toolkit.engine.shards import mark
from toolkit.policy.adapted_linear import adapted_linear
from toolkit.policy.tensor_parallel.functions import enter_parts

if TYPE_CHECKING:
    from toolkit.policy.tensor_parallel.layers import SplitLinear

WHERE = "lora"


class SplitLoraLinear(Linear):  # type: ignore[misc]  # PEFT ships no types that strict mode can use
    """``peft.tuners.lora.Linear`` on a ``SplitLinear``: one plain adapter, not merged."""

    in_features: int
    out_features: int

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's, on the whole layer, so that the same values are drawn for every number of
        processes; then this process's part of them is kept.
        """
        base = self.base_layer
        own = self.in_features, self.out_features
        self.in_features, self.out_features = base.whole_in, base.whole_out
        try:
            super().update_layer(adapter_name, *args, **kwargs)
        finally:
            self.in_features, self.out_features = own
        if adapter_name in self.lora_variant or self.lora_bias[adapter_name]:
            raise UnsupportedError(
                "LoRA variants and biases are not supported on a model that is split",
                where=WHERE,
                fix="use plain LoRA, or tensor_parallel_size: 1",
            )
        if base.cut.style == "columns":
            _keep(self.lora_A[adapter_name], 1, base)
        elif not base.cut.repeated:
            _keep(self.lora_B[adapter_name], 0, base)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(..., part of out) of (..., in), or (..., out) of (..., part of in)."""
        if args or kwargs:
            raise UnsupportedError("adapter_names are not supported on a model that is split")
        base: SplitLinear = self.base_layer
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or not active:
            plain: torch.Tensor = base(x)
            return plain
        name = self._only(active)
        x = base.enter(x)
        a, b = self._halves(name)
        if self._as_under_autocast(x, a):
            out = adapted_linear(x, base.weight, base.own_bias, a, b, self.scaling[name])
        else:
            out = linear(x, base.weight, base.own_bias)
            out = out + linear(linear(x.to(a.dtype), a), b) * self.scaling[name]
        return base.leave(out)

    def used_rows(self, name: str) -> torch.Tensor:
        """The rows of B that this process computes with: all that it has, or those of its KV
        heads. A view.
        """
        cut, b = self.base_layer.cut, self.lora_B[name].weight
        rows: torch.Tensor = b
        if cut.style == "rows" and cut.repeated:
            rows = b[cut.start : cut.start + cut.length]
        return rows

    def _halves(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B as this process uses them; the gradient of a whole one is summed."""
        base, group = self.base_layer, self.base_layer.mesh.group
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        if base.cut.style == "columns":
            return a, enter_parts(b, group)
        if not base.cut.repeated:
            return enter_parts(a, group), b
        rows = slice(base.cut.start, base.cut.start + base.cut.length)
        return enter_parts(a, group), enter_parts(b, group)[rows]

    def _only(self, active: list[str]) -> str:
        if len(active) > 1 or self.merged:
            raise UnsupportedError(
                "several adapters at once, or a merged one, on a model that is split",
                where=WHERE,
                fix="use one adapter, or tensor_parallel_size: 1",
            )
        return active[0]

    def _as_under_autocast(self, x: torch.Tensor, a: torch.Tensor) -> bool:
        """True if autocast would compute base layer and adapter in the dtype of ``x``."""
        device = x.device.type
        return (
            torch.is_autocast_enabled(device)
            and x.dtype == self.base_layer.weight.dtype == torch.get_autocast_dtype(device)
            and a.dtype != x.dtype
        )

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Not here: no process has the whole weight. ``toolkit export`` merges into the files."""
        raise UnsupportedError(
            "an adapter cannot be merged into a model that is split over several processes",
            where="merge",
            fix="save the adapter, and merge it in one process (toolkit export)",
        )


def _keep(layer: nn.Linear, dim: int, base: SplitLinear) -> None:
    """Of a half of an adapter, the part that belongs to this process's part of ``base``."""
    old, cut = layer.weight, base.cut
    kept = old.detach().narrow(dim, cut.start, cut.length).clone()
    layer.weight = nn.Parameter(kept, requires_grad=old.requires_grad)
    mark(layer.weight, dim, cut.total)
    if dim:
        layer.in_features = cut.length
    else:
        layer.out_features = cut.length
