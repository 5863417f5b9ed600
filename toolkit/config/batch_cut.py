"""Losses that depend on how a batch is split into micro-batches."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def _weighs(value: Any) -> bool:
    return value is not None and value != 0


CUT_MATTERS: Mapping[str, Callable[[Any], bool]] = MappingProxyType(
    {
        "loss_type": lambda value: value == "bnpo",
        "top_entropy_quantile": lambda value: value is not None and value < 1,
        "entropy_coef": _weighs,
        "use_adaptive_entropy": lambda value: value is True,
        "router_aux_loss_coef": _weighs,
    }
)
"""Fields of TRL 1.16's GRPOConfig, and the values with which the loss is computed per micro-batch:
a mean over its tokens, a quantile, a bonus or a router loss.
"""
