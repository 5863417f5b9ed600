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
        local_sizes = self.in_features, self.out_features
        self.in_features, self.out_features = base.full_in_features, base.full_out_features
        try:
            super().update_layer(adapter_name, *args, **kwargs)
        finally:
            self.in_features, self.out_features = local_sizes
        if adapter_name in self.lora_variant or self.lora_bias[adapter_name]:
            raise UnsupportedError(
                "LoRA variants and biases are not supported on a model that is split over "
                "several processes",
                where=WHERE,
                fix="use plain LoRA, or set tensor_parallel_size: 1",
            )
        if base.split.style == "columns":
            _keep_local_part(self.lora_A[adapter_name], 1, base)
        elif not base.split.repeated:
            _keep_local_part(self.lora_B[adapter_name], 0, base)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Map (..., in) to (..., part of out) if the base layer is split by rows. Map (..., part of
        in) to (..., out) if it is split by columns.
        """
        if args or kwargs:
            raise UnsupportedError(
                "adapter_names is not supported on a model that is split over several processes"
            )
        base: SplitLinear = self.base_layer
        active_adapters = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or not active_adapters:
            base_output: torch.Tensor = base(x)
            return base_output
        name = self._single_adapter(active_adapters)
        x = base.copy_input(x)
        a, b = self._local_matrices(name)
        if self._autocast_computes_all(x, a):
            out = adapted_linear(x, base.weight, base.local_bias, a, b, self.scaling[name])
        else:
            out = linear(x, base.weight, base.local_bias)
            out = out + linear(linear(x.to(a.dtype), a), b) * self.scaling[name]
        return base.reduce_output(out)

    def used_rows(self, name: str) -> torch.Tensor:
        """Return the rows of B that this process computes with, as a view.

        Usually this process stores only these rows. If several processes compute with the same KV
        heads (``split.repeated``), each process stores the whole B, and this method selects the
        rows for its KV heads.
        """
        split, b = self.base_layer.split, self.lora_B[name].weight
        rows: torch.Tensor = b
        if split.style == "rows" and split.repeated:
            rows = b[split.start : split.start + split.length]
        return rows

    def _local_matrices(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the matrices A and B that this process computes with. If a matrix is not split,
        the backward pass sums its gradient over the group.
        """
        base, group = self.base_layer, self.base_layer.mesh.group
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        if base.split.style == "columns":
            return a, copy_to_parallel_region(b, group)
        if not base.split.repeated:
            return copy_to_parallel_region(a, group), b
        rows = slice(base.split.start, base.split.start + base.split.length)
        return copy_to_parallel_region(a, group), copy_to_parallel_region(b, group)[rows]

    def _single_adapter(self, active_adapters: list[str]) -> str:
        if len(active_adapters) > 1 or self.merged:
            raise UnsupportedError(
                "several active adapters and merged adapters are not supported on a model that is "
                "split over several processes",
                where=WHERE,
                fix="use one adapter and do not merge it, or set tensor_parallel_size: 1",
            )
        return active_adapters[0]

    def _autocast_computes_all(self, x: torch.Tensor, a: torch.Tensor) -> bool:
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


def _keep_local_part(layer: nn.Linear, dim: int, base: SplitLinear) -> None:
    """Replace the weight of ``layer`` (A or B) by this process's part of it. The weight is split
    along ``dim`` in the same way as ``base``.
    """
    full_weight, split = layer.weight, base.split
    local_weight = full_weight.detach().narrow(dim, split.start, split.length).clone()
    layer.weight = nn.Parameter(local_weight, requires_grad=full_weight.requires_grad)
    mark_as_shard(layer.weight, dim, split.total)
    if dim:
        layer.in_features = split.length
    else:
        layer.out_features = split.length
