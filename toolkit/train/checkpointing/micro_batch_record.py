"""When a run is resumed, keep the micro-batch that was chosen automatically at its start.

A generation batch is split into micro-batches. This split determines the order of sums. It also
determines the content of a checkpoint that is written in the middle of a generation. So a run keeps
the split with which it began. A checkpoint records the split as numbers. When the run resumes,
these numbers are used, even on another GPU.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from toolkit.config import parallel
from toolkit.sizing.micro_batch import (
    ACCUMULATION,
    GENERATION_BATCH,
    MICRO_BATCH,
    is_auto,
    read_batch,
    read_count,
)
from toolkit.train.checkpointing import checkpoint
from toolkit.train.checkpointing.run_directory import PACK_TOKENS
from toolkit.train.legal_batches import refuse_too_few_prompts
from toolkit.train.process_control import world_size

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from toolkit.config.run_config import RunConfig

SPLIT_KEYS = (MICRO_BATCH, ACCUMULATION)


def with_recorded(config: RunConfig, checkpoint_dir: Path | None) -> RunConfig:
    """If the micro-batch in ``config`` is "auto", return ``config`` with the micro-batch that was
    recorded in the checkpoint ``checkpoint_dir``. Otherwise return ``config`` unchanged.

    If the user changed the number of completions per step, the recorded micro-batch cannot be used,
    and ``config`` is returned unchanged. A later check reports the change.
    """
    if checkpoint_dir is None or not is_auto(config.grpo):
        return config
    recorded = checkpoint.read_state_value(checkpoint_dir, "run", dict)
    split = {key: recorded.get(f"grpo.{key}") for key in SPLIT_KEYS}
    micro, accumulation = split[MICRO_BATCH], split[ACCUMULATION]
    # A checkpoint without ``pack_tokens`` comes from a version that split batches by rows. The
    # resumed run splits them in the same way.
    pack_tokens = recorded.get(PACK_TOKENS, config.runtime.pack_tokens)
    if not isinstance(micro, int) or not isinstance(accumulation, int):
        return config
    configured_size = config.model.tensor_parallel_size
    size = (
        checkpoint.tensor_parallel_size_of(checkpoint_dir)
        if configured_size == "auto"
        else configured_size
    )
    generation_batch = micro * accumulation * parallel.count_replicas(world_size(), size)
    is_unchanged = generation_batch == config.grpo.get(GENERATION_BATCH)
    return _replace_micro_batch(config, split, pack_tokens) if is_unchanged else config


def config_to_record(config: RunConfig, resolved: RunConfig) -> RunConfig:
    """Return the config that a checkpoint records: ``config``, which the user wrote, with the
    micro-batch of ``resolved`` in place of "auto".
    """
    if not is_auto(config.grpo):
        return config
    return _replace_micro_batch(config, resolved.grpo, resolved.runtime.pack_tokens)


def check_prompt_count(config: RunConfig, prompts: int, replicas: int) -> None:
    """Check that there are enough prompts for one generation.

    Raises:
        ConfigError: there are too few prompts.
    """
    _, _, per_replica = read_batch(config.grpo, 1, on_cpu=False, world_size=replicas)
    group_size = read_count(config.grpo, "num_generations")
    refuse_too_few_prompts(
        prompts,
        per_replica * replicas,
        group_size,
        where=config.dataset.path,
        batch="grpo.per_device_train_batch_size x grpo.gradient_accumulation_steps x number of "
        "replicas",
        split=f" ({per_replica} for each of {replicas} replicas)" if replicas > 1 else "",
    )


def _replace_micro_batch(
    config: RunConfig, split: Mapping[str, Any], pack_tokens: Any
) -> RunConfig:
    grpo = {**config.grpo, **{key: split[key] for key in SPLIT_KEYS}}
    runtime = replace(config.runtime, pack_tokens=pack_tokens)
    return replace(config, grpo=MappingProxyType(grpo), runtime=runtime)
