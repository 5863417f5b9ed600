"""Find the longest sequence that can be trained, for a run that does not fit even with one sequence
per pass.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from toolkit.sizing.micro_batch import ACCUMULATION, MICRO_BATCH

if TYPE_CHECKING:
    from collections.abc import Callable

    from toolkit.config.run_config import RunConfig
    from toolkit.sizing.fit import Candidate, Fit

MIN_SEQUENCE_TOKENS = 32
"""The shortest length, in tokens, that is tried."""


def longest_fitting_sequence(
    config: RunConfig, candidate: Candidate, attempt: Callable[[RunConfig], Fit]
) -> int | None:
    """Return a sequence length (prompt and completion, in tokens) with which the run fits if each
    pass has one sequence. The greatest length that fits is at most 16 tokens or 1/64 longer.

    Return 0 if not even sequences of ``MIN_SEQUENCE_TOKENS`` tokens fit. Return None in two cases:

    - The run fits with the sequence length of ``config`` and one sequence per pass, so shorter
      sequences are not needed.
    - The sequence length of ``config`` is at most ``MIN_SEQUENCE_TOKENS``, so shorter sequences are
      not tried.
    """
    full_length = candidate.work.sequence_tokens

    def fits(length: int) -> bool:
        return attempt(_with_sequence_length(config, candidate, length)).fits

    if full_length <= MIN_SEQUENCE_TOKENS or fits(full_length):
        return None
    if not fits(MIN_SEQUENCE_TOKENS):
        return 0
    low, high = MIN_SEQUENCE_TOKENS, full_length
    while high - low > max(16, low // 64):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _with_sequence_length(config: RunConfig, candidate: Candidate, length: int) -> RunConfig:
    """Return ``config`` for sequences of ``length`` tokens, with one sequence per pass. The
    completion is shortened first, but not below half of ``length``; then the prompt is shortened
    too.
    """
    work = candidate.work
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
        MICRO_BATCH: 1,
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
