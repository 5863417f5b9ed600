"""Rollouts that are split because memory runs out: every completion is generated once and keeps its
row.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from toolkit.engine.oom_backoff import BatchPart, generate_in_parts, is_out_of_memory
from toolkit.engine.rollout_request import Rollout


def rows_of(part: BatchPart) -> list[int]:
    return [row + k for row in part.rows for k in range(part.n)]


def expected_rollout(part: BatchPart) -> Rollout:
    """The token of each completion is its row number, and its log-probability is minus that
    number.
    """
    rows = rows_of(part)
    prompts = [list(prompt) for prompt in part.prompts for _ in range(part.n)]
    logprobs = [[[float(-row)]] for row in rows]
    return Rollout(prompts, [[row] for row in rows], logprobs, [[[row]] for row in rows])


def whole_batch(prompts: int, n: int) -> BatchPart:
    return BatchPart([[5, i] for i in range(prompts)], range(0, prompts * n, n), n)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 90))
def test_split_parts_have_every_completion_once_and_at_most_the_limit(prompts, n, most) -> None:
    parts = whole_batch(prompts, n).split_into_parts(most)
    assert all(part.size <= most for part in parts)
    assert [row for part in parts for row in rows_of(part)] == list(range(prompts * n))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 40), st.integers(1, 90))
def test_a_part_that_does_not_fit_is_generated_in_smaller_parts(prompts, n, limit, at_once) -> None:
    recovered: list[int] = []

    def generate(part: BatchPart) -> Rollout:
        if min(part.size, at_once) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
        return expected_rollout(part)

    batch = whole_batch(prompts, n)
    rollout, max_completions = generate_in_parts(
        generate, batch, None, max_num_seqs=at_once, recover=lambda: recovered.append(1)
    )
    assert rollout == expected_rollout(batch)
    assert (max_completions is None) == (not recovered)
    # A second call starts with the limit that the first one found, so that no part fails.
    again, same = generate_in_parts(
        generate, batch, max_completions, max_num_seqs=at_once, recover=pytest.fail
    )
    assert (again, same) == (rollout, max_completions)


def test_a_rollout_without_logprobs_stays_without_logprobs() -> None:
    def generate(part: BatchPart) -> Rollout:
        if part.size > 2:
            raise MemoryError
        rollout = expected_rollout(part)
        return Rollout(rollout.prompt_ids, rollout.completion_ids, None, None)

    rollout, max_completions = generate_in_parts(
        generate, whole_batch(2, 4), None, max_num_seqs=64, recover=lambda: None
    )
    assert (rollout.logprobs, rollout.logprob_token_ids, max_completions) == (None, None, 2)


def test_a_single_sequence_that_does_not_fit_and_other_errors_raise() -> None:
    tried_sizes: list[int] = []

    def generate(part: BatchPart) -> Rollout:
        tried_sizes.append(part.size)
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 1 byte")

    with pytest.raises(RuntimeError, match="allocate memory"):
        generate_in_parts(generate, whole_batch(1, 4), None, max_num_seqs=64, recover=lambda: None)
    assert tried_sizes == [4, 2, 1]

    def fail(part: BatchPart) -> Rollout:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        generate_in_parts(fail, whole_batch(1, 4), None, max_num_seqs=64, recover=pytest.fail)


def test_out_of_memory_messages_of_allocators() -> None:
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("CUDA error: unspecified launch failure"))
    assert not is_out_of_memory(ValueError("out of memory"))
