"""An auto micro-batch in a run stays the same when the run goes on.

Where the batch is cut decides in which order sums are made, and what a checkpoint in the middle of
a generation holds. So the cut that a run began with belongs to the run: a checkpoint records it as
numbers, and another card does not choose again.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from toolkit.sizing.batch import ACCUMULATION, GENERATION, MICRO, is_auto
from toolkit.train import checkpoint
from toolkit.train.ranks import world_size

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from toolkit.config.model import RunConfig

KEYS = (MICRO, ACCUMULATION)


def kept(config: RunConfig, found: Path | None) -> RunConfig:
    """``config`` with the cut that the checkpoint ``found`` was made with, in place of auto.

    Where the run's size changed, the numbers say nothing: what changed is told later.
    """
    if found is None or not is_auto(config.grpo):
        return config
    then = checkpoint.read_json(found, checkpoint.STATE)["run"]
    cut = {key: then.get(f"grpo.{key}") for key in KEYS}
    micro, accumulation = cut[MICRO], cut[ACCUMULATION]
    if not isinstance(micro, int) or not isinstance(accumulation, int):
        return config
    whole = micro * accumulation * world_size()
    return _with(config, cut) if whole == config.grpo.get(GENERATION) else config


def settled(config: RunConfig, resolved: RunConfig) -> RunConfig:
    """``config`` as written but for the cut, which is ``resolved``'s: what a checkpoint records."""
    return _with(config, resolved.grpo) if is_auto(config.grpo) else config


def _with(config: RunConfig, cut: Mapping[str, Any]) -> RunConfig:
    grpo = {**config.grpo, **{key: cut[key] for key in KEYS}}
    return replace(config, grpo=MappingProxyType(grpo))
