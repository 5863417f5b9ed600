"""The adapters of environments, and the packages behind them."""

from __future__ import annotations

from toolkit.config.trl_names import Package

ADAPTERS = {"reasoning_gym": Package(("reasoning_gym",), "reasoning-gym")}
