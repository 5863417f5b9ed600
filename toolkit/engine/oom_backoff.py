"""Draw a rollout again in smaller parts if memory runs out. The completions stay the same.

A completion depends only on the seed and on its row in the batch
(``rollout_request.request_seed``), not on the other completions of the call. So if a call runs out
of memory, two calls with half of the batch each return the same completions. Only time is lost.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import torch

from toolkit.engine.rollout_request import Rollout

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

logger = logging.getLogger(__name__)

_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|CUBLAS_STATUS_ALLOC_FAILED", re.I
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if ``error`` is an out-of-memory exception of torch or Python, or a RuntimeError
    whose message is the out-of-memory message of an allocator.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


@dataclass(frozen=True, slots=True)
class BatchPart:
    """A part of a batch: ``n`` completions of each of ``prompts``. The row of a completion is its
    index in the batch. ``rows[i]`` is the row of the first completion of prompt i.
    """

    prompts: Sequence[Sequence[int]]
    rows: Sequence[int]
    n: int

    @property
    def size(self) -> int:
        """The number of completions in this part."""
        return len(self.prompts) * self.n

    def halves(self) -> tuple[BatchPart, BatchPart]:
        """Split this part into two halves, in order. A part with several prompts is split by
        prompts. A part with one prompt is split by completions.
        """
        if len(self.prompts) > 1:
            middle = len(self.prompts) // 2
            first = BatchPart(self.prompts[:middle], self.rows[:middle], self.n)
            return first, BatchPart(self.prompts[middle:], self.rows[middle:], self.n)
        middle = self.n // 2
        (row,) = self.rows
        second = BatchPart(self.prompts, [row + middle], self.n - middle)
        return BatchPart(self.prompts, [row], middle), second

    def split_into_parts(self, max_completions: int | None) -> list[BatchPart]:
        """Return this part split into parts of at most ``max_completions`` completions, in order.
        If ``max_completions`` is None, this part is not split.
        """
        if max_completions is None or self.size <= max(max_completions, 1):
            return [self]
        return [part for half in self.halves() for part in half.split_into_parts(max_completions)]


def generate_in_parts(
    generate: Callable[[BatchPart], Rollout],
    batch: BatchPart,
    max_completions: int | None,
    *,
    max_num_seqs: int,
    recover: Callable[[], None],
) -> tuple[Rollout, int | None]:
    """Draw the completions of the batch ``batch``, in smaller parts if memory runs out.

    ``generate`` samples one part. ``max_completions`` is the maximum number of completions per call
    of ``generate`` (None: no limit). ``max_num_seqs`` is the number of sequences that the engine
    runs at a time. ``recover`` makes the engine usable after a failed call.

    Returns the rollout and a new value for ``max_completions``, which is unchanged if no call
    failed. An out-of-memory error is raised only for a part with a single completion. Other errors
    are always raised.
    """
    pending, rollouts = batch.split_into_parts(max_completions), []
    while pending:
        part = pending.pop(0)
        try:
            rollouts.append(generate(part))
            continue
        except (RuntimeError, MemoryError) as error:
            if part.size < 2 or not is_out_of_memory(error):
                raise
            failure = str(error).strip().partition("\n")[0][:300]
        # The rest is outside the exception handler. Within it, the traceback would keep the tensors
        # of the failed call in memory.
        attempted = min(part.size, max_num_seqs)
        max_completions = attempted // 2
        logger.warning(
            "rollout: out of memory with %d sequences. From now on at most %d run at a time (%s)",
            attempted,
            max_completions,
            failure,
        )
        recover()
        pending = [
            smaller
            for unfinished in (part, *pending)
            for smaller in unfinished.split_into_parts(max_completions)
        ]
    return _concatenate(rollouts), max_completions


def _concatenate(rollouts: Sequence[Rollout]) -> Rollout:
    """Join ``rollouts`` into one rollout with all their completions, in order."""
    if len(rollouts) == 1:
        return rollouts[0]
    logprobs = [r.logprobs for r in rollouts if r.logprobs is not None]
    tokens = [r.logprob_token_ids for r in rollouts if r.logprob_token_ids is not None]
    scored = len(logprobs) == len(rollouts)
    return Rollout(
        list(chain.from_iterable(r.prompt_ids for r in rollouts)),
        list(chain.from_iterable(r.completion_ids for r in rollouts)),
        list(chain.from_iterable(logprobs)) if scored else None,
        list(chain.from_iterable(tokens)) if scored else None,
    )
