"""What an empty interval costs to open: each change tried by itself, priced by how much less is
missing.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from toolkit.config.ranks import LEGAL_RANKS
from toolkit.sizing.batch import divisors
from toolkit.sizing.lora import legal_rank
from toolkit.sizing.result import Remedy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from toolkit.config.model import RunConfig
    from toolkit.sizing.fit import Case


def remedies_for(case: Case, short: int, missing: Callable[[RunConfig], int]) -> tuple[Remedy, ...]:
    """Changes of ``case.config`` that free something, the dearest first. ``missing`` gives the
    bytes that a config is short of.
    """
    found = []
    for change, config in _changes(case):
        left = missing(config)
        if left < short:
            found.append(Remedy(change, short - left, left <= 0))
    # What is enough by itself first, and then by price.
    return tuple(sorted(found, key=lambda remedy: (not remedy.enough, -remedy.frees_bytes)))


def _changes(case: Case) -> Iterator[tuple[str, RunConfig]]:
    config = case.config
    model, lora = config.model, config.lora
    yield from _lengths(case)
    micro, accumulation = case.step.micro_batch, case.step.accumulation
    if micro > 1:
        smaller = next(one for one in divisors(micro) if one <= micro // 2)
        more = accumulation * micro // smaller
        values = {
            "per_device_train_batch_size": smaller,
            "gradient_accumulation_steps": more,
        }
        yield (
            f"per_device_train_batch_size {micro} -> {smaller} "
            f"(gradient_accumulation_steps {accumulation} -> {more})",
            _grpo(config, **values),
        )
    if not case.step.checkpointing:
        yield (
            "use_gradient_checkpointing: true",
            replace(config, lora=replace(lora, use_gradient_checkpointing=True)),
        )
    if case.plan.max_lora_rank > legal_rank(lora.largest_rank):
        rank = legal_rank(lora.largest_rank)
        yield (
            f"max_lora_rank {case.plan.max_lora_rank} -> {rank}",
            replace(config, model=replace(model, max_lora_rank=rank)),
        )
    lower = [rank for rank in LEGAL_RANKS if rank < lora.r]
    if lower:
        changed = replace(model, max_lora_rank=lower[-1])
        yield (
            f"lora.r {lora.r} -> {lower[-1]}",
            replace(config, model=changed, lora=replace(lora, r=lower[-1])),
        )
    yield from _engine_changes(case)


def _lengths(case: Case) -> Iterator[tuple[str, RunConfig]]:
    config, work = case.config, case.work
    if work.completion >= 128:
        half = work.completion // 2
        shorter = max(config.model.max_seq_length - (work.completion - half), 64)
        changed = replace(
            _grpo(config, max_completion_length=half),
            model=replace(config.model, max_seq_length=shorter),
        )
        yield (
            f"max_completion_length {work.completion} -> {half} (max_seq_length {shorter})",
            changed,
        )


def _engine_changes(case: Case) -> Iterator[tuple[str, RunConfig]]:
    if not case.plan.on_gpu:
        return
    model = case.config.model
    trials: list[tuple[bool, str, dict[str, Any]]] = [
        (case.plan.quantization is None, "load_in_4bit: true", {"load_in_4bit": True}),
        (not case.plan.sleep, "enable_sleep_mode: true", {"enable_sleep_mode": True}),
        (not case.plan.share_weights, "share_weights: true", {"share_weights": True}),
        (not case.plan.float8_kv_cache, "float8_kv_cache: true", {"float8_kv_cache": True}),
        (not case.plan.enforce_eager, "enforce_eager: true", {"enforce_eager": True}),
    ]
    tokens = case.plan.max_num_batched_tokens
    if tokens >= 1024:
        trials.append(
            (
                True,
                f"max_num_batched_tokens {tokens} -> {tokens // 2}",
                {"max_num_batched_tokens": tokens // 2},
            )
        )
    sequences = case.plan.max_num_seqs
    if sequences > 1:
        trials.append(
            (
                True,
                f"max_num_seqs {sequences} -> {sequences // 2}",
                {"max_num_seqs": sequences // 2},
            )
        )
    for possible, change, values in trials:
        if possible:
            yield change, replace(case.config, model=replace(model, **values))


def _grpo(config: RunConfig, **values: int) -> RunConfig:
    return replace(config, grpo=MappingProxyType({**config.grpo, **values}))
