"""Define a PEFT LoRA layer for a base layer that is split over processes.

If the base layer is split by rows, B is split by rows too, and every process has all of A. If the
base layer is split by columns, A is split by columns too, and every process has all of B. Every
process computes with the matrix that is not split. So the gradients of this matrix are summed over
the group.

There is one exception. If several processes have the same KV head, neither A nor B is split. Every
process then uses only the rows of B for its own KV heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import Linear
from torch import nn
from torch.nn.functional import linear

from toolkit.base.errors import UnsupportedError
from toolkit.engine.shards import mark_as_shard
from toolkit.policy.adapted_linear import adapted_linear
from toolkit.policy.tensor_parallel.functions import copy_to_parallel_region

if TYPE_CHECKING:
    from toolkit.policy.tensor_parallel.layers import SplitLinear

WHERE = "lora"


class SplitLoraLinear(Linear):  # type: ignore[misc]  # PEFT ships no types that strict mode can use
    """``peft.tuners.lora.Linear`` with a ``SplitLinear`` as its base layer. It supports one plain
    adapter, which cannot be merged.
    """

    in_features: int
    out_features: int

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Let PEFT create the adapter of the whole layer, and then keep only this process's part of
        the adapter. So the adapter's random values do not depend on the number of processes.
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
                "LoRA variants and biases are not supported on a model that is split over "
                "several processes",
                where=WHERE,
                fix="use plain LoRA, or set tensor_parallel_size: 1",
            )
        if base.cut.style == "columns":
            _keep(self.lora_A[adapter_name], 1, base)
        elif not base.cut.repeated:
            _keep(self.lora_B[adapter_name], 0, base)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Map (..., in) to (..., part of out) if the base layer is split by rows. Map (..., part of
        in) to (..., out) if it is split by columns.
        """
        if args or kwargs:
            raise UnsupportedError(
                "adapter_names is not supported on a model that is split over several processes"
            )
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
        """Return a view of the rows of B that this process computes with. If other processes have
        the same KV heads, these are the rows for the KV heads of this process. Otherwise they are
        all rows that this process has.
        """
        cut, b = self.base_layer.cut, self.lora_B[name].weight
        rows: torch.Tensor = b
        if cut.style == "rows" and cut.repeated:
            rows = b[cut.start : cut.start + cut.length]
        return rows

    def _halves(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the matrices A and B that this process computes with. If a matrix is not split,
        the backward pass sums its gradient over the group.
        """
        base, group = self.base_layer, self.base_layer.mesh.group
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        if base.cut.style == "columns":
            return a, copy_to_parallel_region(b, group)
        if not base.cut.repeated:
            return copy_to_parallel_region(a, group), b
        rows = slice(base.cut.start, base.cut.start + base.cut.length)
        return copy_to_parallel_region(a, group), copy_to_parallel_region(b, group)[rows]

    def _only(self, active: list[str]) -> str:
        if len(active) > 1 or self.merged:
            raise UnsupportedError(
                "several active adapters and merged adapters are not supported on a model that is "
                "split over several processes",
                where=WHERE,
                fix="use one adapter and do not merge it, or set tensor_parallel_size: 1",
            )
        return active[0]

    def _as_under_autocast(self, x: torch.Tensor, a: torch.Tensor) -> bool:
        """Return True if autocast would compute the base layer and the adapter in the dtype of
        ``x``.
        """
        device = x.device.type
        return (
            torch.is_autocast_enabled(device)
            and x.dtype == self.base_layer.weight.dtype == torch.get_autocast_dtype(device)
            and a.dtype != x.dtype
        )

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Raise UnsupportedError, because no process has the whole weight. ``toolkit export`` can
        merge a saved adapter.
        """
        raise UnsupportedError(
            "an adapter cannot be merged into a model that is split over several processes",
            where="merge",
            fix="save the adapter, and merge it in one process with `toolkit export`",
        )


def _keep(layer: nn.Linear, dim: int, base: SplitLinear) -> None:
    """Replace the weight of ``layer`` (A or B) by this process's part of it. The weight is split
    along ``dim`` in the same way as ``base``.
    """
    old, cut = layer.weight, base.cut
    kept = old.detach().narrow(dim, cut.start, cut.length).clone()
    layer.weight = nn.Parameter(kept, requires_grad=old.requires_grad)
    mark_as_shard(layer.weight, dim, cut.total)
    if dim:
        layer.in_features = cut.length
    else:
        layer.out_features = cut.length
