"""The longest sequence that can be trained on, where a run does not fit with one at a time."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from toolkit.sizing.micro_batch import ACCUMULATION, MICRO

if TYPE_CHECKING:
    from collections.abc import Callable

    from toolkit.config.run_config import RunConfig
    from toolkit.sizing.fit import Case, Fit

SHORTEST = 32
"""Tokens of a sequence below which nothing is tried."""


def longest_that_fits(
    config: RunConfig, case: Case, attempt: Callable[[RunConfig], Fit]
) -> int | None:
    """The most tokens of a sequence (prompt and completion) with which the run fits, one sequence
    in a pass; 0 where no length does, None where the length is not what is too much.
    """
    whole = case.work.sequence_tokens

    def fits(length: int) -> bool:
        return attempt(_shorter(config, case, length)).fits

    if whole <= SHORTEST or fits(whole):
        return None
    if not fits(SHORTEST):
        return 0
    low, high = SHORTEST, whole
    while high - low > max(16, low // 64):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _shorter(config: RunConfig, case: Case, length: int) -> RunConfig:
    """``config`` with sequences of ``length`` tokens, one in a pass: the completion is cut first,
    down to half of the length.
    """
    work = case.work
    prompt = max(
        1,
        min(
            work.sequence_tokens - min(work.completion_tokens, work.sequence_tokens - 1),
            length // 2,
        ),
    )
    rows = work.rollouts
    grpo = {
        **config.grpo,
        MICRO: 1,
        ACCUMULATION: rows,
        "max_prompt_length": prompt,
        "max_completion_length": max(1, length - prompt),
    }
    return replace(
        config,
        model=replace(config.model, max_seq_length=length),
        grpo=MappingProxyType(grpo),
        runtime=replace(config.runtime, pack_tokens="auto"),
    )
