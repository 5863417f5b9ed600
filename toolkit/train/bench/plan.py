"""Micro-batch, checkpointing and KV sleep of our arm: what sizing makes of the peers' memory.

The peers are given a micro-batch and gradient checkpointing by hand. Ours asks the sizer, as a run
with "auto" does, but within the memory that sizing predicts for that same setting by hand: the
comparison is of time at no more memory.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from types import MappingProxyType
from typing import TYPE_CHECKING

from toolkit.config.model import LoraSection, ModelSection, RunConfig, RuntimeSection
from toolkit.sizing import solve

if TYPE_CHECKING:
    from toolkit.sizing import Device, SizingResult
    from toolkit.sizing.model import ModelSpec
    from toolkit.train.bench.settings import Settings


def fill(settings: Settings, spec: ModelSpec, device: Device | None) -> Settings:
    """``settings`` with every ``ours_`` field that is None filled.

    The largest micro-batch whose peak is within that of the peers' setting; of its forms, first the
    one without checkpointing, then the one without KV sleep. Without a GPU, or where the peers'
    setting does not fit, ours is theirs.
    """
    by_hand = _filled(settings, settings.per_device_batch, settings.gradient_checkpointing, False)
    if device is None:
        return by_hand
    peers = size(by_hand, spec, device)
    if not peers.feasible:
        return by_hand
    micros = [n for n in range(settings.sequences, 0, -1) if settings.sequences % n == 0]
    for micro, checkpointing, sleep in product(micros, (False, True), (False, True)):
        candidate = _filled(settings, micro, checkpointing, sleep)
        sized = size(candidate, spec, device)
        if sized.feasible and sized.peaks.torch_bytes <= peers.peaks.torch_bytes:
            return candidate
    return by_hand


def _filled(settings: Settings, micro: int, checkpointing: bool, sleep: bool) -> Settings:
    """What was written by hand stays."""
    return replace(
        settings,
        ours_batch=settings.ours_batch or micro,
        ours_checkpointing=_first(settings.ours_checkpointing, checkpointing),
        ours_sleep=_first(settings.ours_sleep, sleep),
    )


def _first(written: bool | None, chosen: bool) -> bool:
    return chosen if written is None else written


def size(settings: Settings, spec: ModelSpec, device: Device | None) -> SizingResult:
    """Our arm's run as sizing sees it."""
    batch = settings.ours_batch or settings.per_device_batch
    return solve(
        RunConfig(
            model=ModelSection(
                model_name=settings.model,
                max_seq_length=settings.max_seq_length,
                load_in_4bit=settings.load_in_4bit,
                max_lora_rank=settings.r,
                gpu_memory_utilization=settings.gpu_memory_utilization,
                enable_sleep_mode=settings.ours_sleep is True,
                fast_inference=True,
            ),
            lora=LoraSection(
                r=settings.r,
                lora_alpha=settings.r,
                use_gradient_checkpointing=settings.ours_checkpointing is True,
            ),
            grpo=MappingProxyType(
                {
                    "per_device_train_batch_size": batch,
                    "gradient_accumulation_steps": max(1, settings.sequences // batch),
                    "num_generations": settings.num_generations,
                    "max_prompt_length": settings.prompt_tokens,
                    "max_completion_length": settings.completion_tokens,
                }
            ),
            runtime=RuntimeSection(engine="vllm"),
        ),
        spec,
        device,
    )
