"""An auto micro-batch in a run stays the same when the run goes on.

Where the batch is cut decides in which order sums are made, and what a checkpoint in the middle of
a generation holds. So the cut that a run began with belongs to the run: a checkpoint records it as
numbers, and another card does not choose again.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from toolkit.base.errors import ConfigError
from toolkit.config import parallel
from toolkit.sizing.micro_batch import ACCUMULATION, GENERATION, MICRO, batch_of, count, is_auto
from toolkit.train.checkpointing import checkpoint
from toolkit.train.checkpointing.run_directory import PACK_TOKENS
from toolkit.train.process_control import world_size

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from toolkit.config.run_config import RunConfig

KEYS = (MICRO, ACCUMULATION)


def kept(config: RunConfig, found: Path | None) -> RunConfig:
    """``config`` with the cut that the checkpoint ``found`` was made with, in place of auto.

    Where the run's size changed, the numbers say nothing: what changed is told later.
    """
    if found is None or not is_auto(config.grpo):
        return config
    then = checkpoint.read_state(found, "run", dict)
    cut = {key: then.get(f"grpo.{key}") for key in KEYS}
    micro, accumulation = cut[MICRO], cut[ACCUMULATION]
    # A checkpoint of a version without it was cut by rows, and so it is cut from here on.
    tokens = then.get(PACK_TOKENS, config.runtime.pack_tokens)
    if not isinstance(micro, int) or not isinstance(accumulation, int):
        return config
    written = config.model.tensor_parallel_size
    size = checkpoint.split_of(found) if written == "auto" else written
    whole = micro * accumulation * parallel.replicas(world_size(), size)
    same = whole == config.grpo.get(GENERATION)
    return _with(config, cut, tokens) if same else config


def settled(config: RunConfig, resolved: RunConfig) -> RunConfig:
    """``config`` as written but for the cut, which is ``resolved``'s: what a checkpoint records."""
    if not is_auto(config.grpo):
        return config
    return _with(config, resolved.grpo, resolved.runtime.pack_tokens)


def refuse_too_few(config: RunConfig, prompts: int, processes: int) -> None:
    """One generation of all processes takes whole prompts, and what is left over at the end of an
    epoch is dropped: with fewer prompts than that, no step would ever be made.

    Raises:
        ConfigError: naming both numbers.
    """
    _, _, own = batch_of(config.grpo, 1, on_cpu=False, world_size=processes)
    group = count(config.grpo, "num_generations")
    needed = max(1, own * processes // group)
    if prompts >= needed:
        return
    raise ConfigError(
        f"{prompts} prompts, and one generation takes {needed}: {own * processes} completions"
        f" ({own} in each of {processes} processes) / {group} completions of a prompt; no step"
        " could be made",
        where=config.dataset.path,
        fix=f"use at least {needed} prompts, or a generation batch of at most {prompts * group}"
        " completions (grpo.per_device_train_batch_size x grpo.gradient_accumulation_steps x"
        " processes)",
    )


def _with(config: RunConfig, cut: Mapping[str, Any], tokens: Any) -> RunConfig:
    grpo = {**config.grpo, **{key: cut[key] for key in KEYS}}
    runtime = replace(config.runtime, pack_tokens=tokens)
    return replace(config, grpo=MappingProxyType(grpo), runtime=runtime)
