"""Define PEFT's LoRA layer on a layer that is split.

If the layer is split by rows, every process has all of A, and B is split with the layer. If it is
split by columns, A is split and every process has all of B. A tensor that is not split is used by
every process for its part of the output, so its gradients are added up. If several processes have
the same KV head, all of them have B of that head, and each uses its own rows.
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
        """Let PEFT create the adapter of the whole layer, so that the same values are drawn for
        every number of processes, and keep this process's part of it.
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
        """Map (..., in) to (..., part of out), or (..., part of in) to (..., out)."""
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
        """The rows of B that this process computes with: all rows that it has, or those of its KV
        heads. The result is a view.
        """
        cut, b = self.base_layer.cut, self.lora_B[name].weight
        rows: torch.Tensor = b
        if cut.style == "rows" and cut.repeated:
            rows = b[cut.start : cut.start + cut.length]
        return rows

    def _halves(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B in the form that this process computes with; the gradient of a tensor that is not
        split is summed.
        """
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
        """Whether autocast would compute base layer and adapter in the dtype of ``x``."""
        device = x.device.type
        return (
            torch.is_autocast_enabled(device)
            and x.dtype == self.base_layer.weight.dtype == torch.get_autocast_dtype(device)
            and a.dtype != x.dtype
        )

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Raise an error: no process has the whole weight. ``toolkit export`` merges into the
        files.
        """
        raise UnsupportedError(
            "an adapter cannot be merged into a model that is split over several processes",
            where="merge",
            fix="save the adapter, and merge it in one process (toolkit export)",
        )


def _keep(layer: nn.Linear, dim: int, base: SplitLinear) -> None:
    """Keep this process's part of A or B (``layer``), which is split along ``dim`` as
    ``base`` is.
    """
    old, cut = layer.weight, base.cut
    kept = old.detach().narrow(dim, cut.start, cut.length).clone()
    layer.weight = nn.Parameter(kept, requires_grad=old.requires_grad)
    mark(layer.weight, dim, cut.total)
    if dim:
        layer.in_features = cut.length
    else:
        layer.out_features = cut.length
