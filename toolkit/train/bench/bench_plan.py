"""Choose the settings of the toolkit's arm so that it needs no more memory than the other arms: the
micro-batch, gradient checkpointing, whether the KV cache is freed during training, and the options
of the engine.

The other arms use the micro-batch and the gradient checkpointing that the user set. The sizer (the
toolkit's memory estimate) chooses the settings of the toolkit's arm, as it does for a run file with
the value "auto". The memory limit is the peak memory that the sizer predicts for Unsloth's arm.
TRL's arm needs more, because only Unsloth moves activation checkpoints to the host. So the arms can
be compared by time alone.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from types import MappingProxyType
from typing import TYPE_CHECKING

from toolkit.config.run_config import LoraSection, ModelSection, RunConfig, RuntimeSection
from toolkit.sizing import solve

if TYPE_CHECKING:
    from toolkit.sizing import Device, SizingResult
    from toolkit.sizing.model_blocks import ModelSpec
    from toolkit.sizing.workload import Checkpointing
    from toolkit.train.bench.arm_settings import Settings


def choose_settings(settings: Settings, spec: ModelSpec, device: Device | None) -> Settings:
    """Return ``settings`` with a value for every ``ours_`` field (settings of the toolkit's arm)
    whose value is None.

    The sizer predicts the peak memory and the time of a step for each combination of values. A
    combination is allowed if it fits on the card and its peak memory is at most that of the other
    arms (TRL, Unsloth). The allowed combination with the shortest step is chosen. Without a GPU, or
    if no combination is allowed, the toolkit's arm gets the micro-batch and the gradient
    checkpointing of the other arms.
    """
    by_hand = _with_values(
        settings, settings.per_device_batch, settings.gradient_checkpointing, False
    )
    if device is None:
        return by_hand
    # The other arms cannot split the model. If the toolkit's arm splits it, only the memory of the
    # card is the limit.
    limit = other_arms_peak_bytes(settings, spec, device) if settings.ours_cards == 1 else math.inf
    best, fastest = by_hand, math.inf
    for tokens, *flags in product(_token_candidates(settings), (False, True), (False, True)):
        rows = max(1, tokens // settings.sequence_tokens)
        micro_batch = next(n for n in range(rows, 0, -1) if settings.sequences % n == 0)
        candidate = _with_values(settings, micro_batch, *flags, tokens=tokens)
        candidate = _with_engine_options(candidate, solve_settings(candidate, spec, device), device)
        result = solve_settings(candidate, spec, device)
        fits = result.feasible and result.peaks.torch_bytes <= limit
        if fits and result.trainer.step_s_estimate < fastest:
            best, fastest = candidate, result.trainer.step_s_estimate
    return best


def other_arms_peak_bytes(settings: Settings, spec: ModelSpec, device: Device) -> int:
    """Return the peak memory that the sizer predicts for the other arms (TRL, Unsloth), in bytes.
    The prediction assumes one copy of the weights and a KV cache that is not freed. It also assumes
    that activation checkpoints are on the host, which is how Unsloth stores them.
    """
    other_settings = replace(
        settings, ours_batch=settings.per_device_batch, ours_sleep=False, ours_engine=None
    )
    result = solve_settings(other_settings, spec, device, checkpointing="unsloth", padded=True)
    return result.peaks.torch_bytes


def _token_candidates(settings: Settings) -> list[int]:
    """Return the candidates for ``ours_tokens`` (the maximum number of tokens of a forward pass),
    the largest first.

    If the user set ``ours_batch``, the only candidate is the number of tokens of ``ours_batch``
    sequences. If the user set only ``ours_tokens``, the only candidate is the value of
    ``ours_tokens``. If the user set neither, the largest candidate is the number of tokens of a
    whole optimizer step in which all sequences have the maximum length. The other candidates are
    fractions of the largest candidate, but at least the number of tokens of one sequence.
    """
    sequence_tokens = settings.sequence_tokens
    if settings.ours_batch is not None:
        return [settings.ours_batch * sequence_tokens]
    if settings.ours_tokens is not None:
        return [settings.ours_tokens]
    step_tokens = settings.prompts * settings.prompt_tokens
    step_tokens += settings.sequences * settings.completion_tokens
    return [
        max(sequence_tokens, step_tokens // parts)
        for parts in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128)
    ]


def _with_values(
    settings: Settings,
    micro_batch: int,
    checkpointing: bool,
    sleep: bool,
    *,
    tokens: int | None = None,
) -> Settings:
    """Return ``settings`` with the given values in those ``ours_`` fields that the user did not
    set.
    """
    return replace(
        settings,
        ours_tokens=settings.ours_tokens if settings.ours_batch is not None else tokens,
        ours_batch=settings.ours_batch or micro_batch,
        ours_checkpointing=_set_or_chosen(settings.ours_checkpointing, checkpointing),
        ours_sleep=_set_or_chosen(settings.ours_sleep, sleep),
    )


def _with_engine_options(settings: Settings, result: SizingResult, device: Device) -> Settings:
    """Return ``settings`` with a value for the field ``ours_engine``, the options of the engine. A
    value that the user set is kept. ``result`` is the sizing result for ``settings``.

    The KV cache is just large enough for all sequences of a step, because a larger one has no use:
    every step changes the adapter, so cached prompts of earlier steps are not valid. The engine
    never gets a larger share of the card than the engines of the other arms (the programs that the
    benchmark compares).
    """
    min_share = result.interval.min
    if settings.ours_engine is not None or min_share is None:
        return settings
    extra_bytes = max(result.engine.kv_wanted_bytes - result.engine.kv_sequence_bytes, 0)
    # 1 % is spare.
    share = math.ceil(100 * (min_share + extra_bytes / device.cuda_total_bytes) + 1) / 100
    options = {
        "gpu_memory_utilization": min(share, settings.gpu_memory_utilization),
        "max_num_seqs": result.choice.max_num_seqs,
        "max_num_batched_tokens": result.choice.max_num_batched_tokens,
    }
    if settings.load_in_4bit:
        options["dequantized_rollouts"] = result.choice.dequantized_rollouts
    return replace(settings, ours_engine=options)


def _set_or_chosen(set_value: bool | None, chosen_value: bool) -> bool:
    return chosen_value if set_value is None else set_value


def solve_settings(
    settings: Settings,
    spec: ModelSpec,
    device: Device | None,
    *,
    checkpointing: Checkpointing | None = None,
    padded: bool = False,
) -> SizingResult:
    """Return the sizer's result for the toolkit's arm. If ``checkpointing`` is given, it replaces
    the value in ``settings``. If ``padded`` is True, rows are padded and no kernels are fused, as
    in TRL.
    """
    batch = settings.ours_batch or settings.per_device_batch
    share = (settings.ours_engine or {}).get(
        "gpu_memory_utilization", settings.gpu_memory_utilization
    )
    if checkpointing is None:
        checkpointing = settings.ours_checkpointing is True
    return solve(
        RunConfig(
            model=ModelSection(
                model_name=settings.model,
                max_seq_length=settings.max_seq_length,
                load_in_4bit=settings.load_in_4bit,
                max_lora_rank=settings.r,
                gpu_memory_utilization=share,
                enable_sleep_mode=settings.ours_sleep is True,
                fast_inference=True,
                tensor_parallel_size=settings.ours_cards,
            ),
            lora=LoraSection(
                r=settings.r,
                lora_alpha=settings.r,
                use_gradient_checkpointing=checkpointing,
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
            runtime=RuntimeSection(
                engine="vllm",
                padding_free=not padded,
                pack_tokens="auto" if padded else settings.ours_tokens or "auto",
                fused_kernels=False if padded else "auto",
            ),
        ),
        spec,
        device,
        world_size=settings.ours_cards,
    )
