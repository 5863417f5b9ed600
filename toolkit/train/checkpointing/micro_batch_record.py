"""Keep an automatically chosen micro-batch when the run is resumed.

The split of a batch into micro-batches decides the order of sums, and what a checkpoint in the
middle of a generation contains. So a run keeps the split that it began with. A checkpoint records
it as numbers, which are not chosen again on another GPU.
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
    """``config`` with auto replaced by the micro-batch that the checkpoint ``found`` records.

    If the size of the run changed, the numbers do not apply; a later check reports the change.
    """
    if found is None or not is_auto(config.grpo):
        return config
    then = checkpoint.read_state(found, "run", dict)
    cut = {key: then.get(f"grpo.{key}") for key in KEYS}
    micro, accumulation = cut[MICRO], cut[ACCUMULATION]
    # A checkpoint without the number comes from a version that split by rows; the run keeps to
    # that.
    tokens = then.get(PACK_TOKENS, config.runtime.pack_tokens)
    if not isinstance(micro, int) or not isinstance(accumulation, int):
        return config
    written = config.model.tensor_parallel_size
    size = checkpoint.split_of(found) if written == "auto" else written
    whole = micro * accumulation * parallel.replicas(world_size(), size)
    same = whole == config.grpo.get(GENERATION)
    return _with(config, cut, tokens) if same else config


def recorded_config(config: RunConfig, resolved: RunConfig) -> RunConfig:
    """The config that a checkpoint records: ``config`` as the user wrote it, with the micro-batch
    of ``resolved``.
    """
    if not is_auto(config.grpo):
        return config
    return _with(config, resolved.grpo, resolved.runtime.pack_tokens)


def refuse_too_few(config: RunConfig, prompts: int, processes: int) -> None:
    """Check that there are enough prompts for one generation. TRL drops the prompts that do not
    fill a generation at the end of an epoch, so with fewer prompts no step would run.

    Raises:
        ConfigError: there are too few prompts; the message says how many there are and how many are
            needed.
    """
    _, _, own = batch_of(config.grpo, 1, on_cpu=False, world_size=processes)
    group = count(config.grpo, "num_generations")
    needed = max(1, own * processes // group)
    if prompts >= needed:
        return
    raise ConfigError(
        f"{prompts} prompts, and one generation takes {needed}: {own * processes} completions "
        f"({own} in each of {processes} processes) / {group} completions of a prompt; no step "
        "would run",
        where=config.dataset.path,
        fix=f"use at least {needed} prompts, or a generation batch of at most {prompts * group}"
        " completions (grpo.per_device_train_batch_size x grpo.gradient_accumulation_steps x"
        " processes)",
    )


def _with(config: RunConfig, cut: Mapping[str, Any], tokens: Any) -> RunConfig:
    grpo = {**config.grpo, **{key: cut[key] for key in KEYS}}
    runtime = replace(config.runtime, pack_tokens=tokens)
    return replace(config, grpo=MappingProxyType(grpo), runtime=runtime)
