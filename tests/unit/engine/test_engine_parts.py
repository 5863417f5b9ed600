"""Rollouts cut where memory runs out: every completion once, in its place."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from toolkit.engine.oom_backoff import BatchPart, generate_in_parts, is_out_of_memory
from toolkit.engine.rollout_request import Rollout


def rows_of(part: BatchPart) -> list[int]:
    return [row + k for row in part.rows for k in range(part.n)]


def drawn(part: BatchPart) -> Rollout:
    """A completion is its row; its log-probability is minus it."""
    rows = rows_of(part)
    prompts = [list(prompt) for prompt in part.prompts for _ in range(part.n)]
    logprobs = [[[float(-row)]] for row in rows]
    return Rollout(prompts, [[row] for row in rows], logprobs, [[[row]] for row in rows])


def whole(prompts: int, n: int) -> BatchPart:
    return BatchPart([[5, i] for i in range(prompts)], range(0, prompts * n, n), n)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 90))
def test_parts_hold_every_completion_once_and_no_more_than_fit(prompts, n, most) -> None:
    parts = whole(prompts, n).split_to(most)
    assert all(part.size <= most for part in parts)
    assert [row for part in parts for row in rows_of(part)] == list(range(prompts * n))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 40), st.integers(1, 90))
def test_what_does_not_fit_is_drawn_in_smaller_parts(prompts, n, limit, at_once) -> None:
    recovered: list[int] = []

    def draw(part: BatchPart) -> Rollout:
        if min(part.size, at_once) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
        return drawn(part)

    all_of_it = whole(prompts, n)
    rollout, most = generate_in_parts(
        draw, all_of_it, None, max_num_seqs=at_once, recover=lambda: recovered.append(1)
    )
    assert rollout == drawn(all_of_it)
    assert (most is None) == (not recovered)
    again, same = generate_in_parts(
        draw, all_of_it, most, max_num_seqs=at_once, recover=pytest.fail
    )
    assert (again, same) == (rollout, most)  # what was found is kept to: nothing fails twice


def test_without_logprobs_there_are_none() -> None:
    def draw(part: BatchPart) -> Rollout:
        if part.size > 2:
            raise MemoryError
        rollout = drawn(part)
        return Rollout(rollout.prompt_ids, rollout.completion_ids, None, None)

    rollout, most = generate_in_parts(
        draw, whole(2, 4), None, max_num_seqs=64, recover=lambda: None
    )
    assert (rollout.logprobs, rollout.logprob_token_ids, most) == (None, None, 2)


def test_one_sequence_that_does_not_fit_and_other_errors_are_passed_on() -> None:
    tried: list[int] = []

    def draw(part: BatchPart) -> Rollout:
        tried.append(part.size)
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 1 byte")

    with pytest.raises(RuntimeError, match="allocate memory"):
        generate_in_parts(draw, whole(1, 4), None, max_num_seqs=64, recover=lambda: None)
    assert tried == [4, 2, 1]

    def fail(part: BatchPart) -> Rollout:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        generate_in_parts(fail, whole(1, 4), None, max_num_seqs=64, recover=pytest.fail)


def test_texts_of_allocators() -> None:
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("CUDA error: unspecified launch failure"))
    assert not is_out_of_memory(ValueError("out of memory"))
