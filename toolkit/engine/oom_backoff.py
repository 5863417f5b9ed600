"""Retry a rollout in smaller parts if memory runs out, with the same completions.

A completion depends only on the seed and its row (``rollout_request.request_seed``), not on the
other completions of the call. So a call that did not fit is repeated in halves with the same
result, and only time is lost.
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

_OOM = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|CUBLAS_STATUS_ALLOC_FAILED", re.I
)


def is_out_of_memory(error: BaseException) -> bool:
    """True for torch's out-of-memory class, and for RuntimeErrors with the text of an allocator."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(_OOM.search(str(error)))


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a batch: ``n`` completions of each of ``prompts``. ``rows[i]`` is the row of the
    first completion of prompt i.
    """

    prompts: Sequence[Sequence[int]]
    rows: Sequence[int]
    n: int

    @property
    def size(self) -> int:
        """The number of completions in this part."""
        return len(self.prompts) * self.n

    def halves(self) -> tuple[Part, Part]:
        """Split this part by its prompts, or a single prompt by its completions; the halves are in
        order.
        """
        if len(self.prompts) > 1:
            middle = len(self.prompts) // 2
            first = Part(self.prompts[:middle], self.rows[:middle], self.n)
            return first, Part(self.prompts[middle:], self.rows[middle:], self.n)
        middle = self.n // 2
        (row,) = self.rows
        rest = Part(self.prompts, [row + middle], self.n - middle)
        return Part(self.prompts, [row], middle), rest

    def fit(self, most: int | None) -> list[Part]:
        """Split this part into parts of at most ``most`` completions, in order; None means no
        limit.
        """
        if most is None or self.size <= max(most, 1):
            return [self]
        return [part for half in self.halves() for part in half.fit(most)]


def in_parts(
    draw: Callable[[Part], Rollout],
    whole: Part,
    most: int | None,
    *,
    at_once: int,
    recover: Callable[[], None],
) -> tuple[Rollout, int | None]:
    """(rollout of ``whole``, the number of completions at a time that fits; ``most`` if no call
    failed).

    ``draw`` samples one part. ``at_once`` is the number of sequences that the engine runs at a
    time. ``recover`` makes the engine usable after a failed call. An error other than out of memory
    is raised, and so is out of memory with a single completion.
    """
    waiting, done = whole.fit(most), []
    while waiting:
        part = waiting.pop(0)
        try:
            done.append(draw(part))
            continue
        except (RuntimeError, MemoryError) as error:
            if part.size < 2 or not is_out_of_memory(error):
                raise
            failure = str(error).strip().partition("\n")[0][:300]
        # This is outside the exception handler, because the traceback references tensors of the
        # failed call.
        tried = min(part.size, at_once)
        most = tried // 2
        logger.warning(
            "rollout: out of memory with %d sequences, at most %d at a time from now on (%s)",
            tried,
            most,
            failure,
        )
        recover()
        waiting = [smaller for left in (part, *waiting) for smaller in left.fit(most)]
    return _joined(done), most


def _joined(rollouts: Sequence[Rollout]) -> Rollout:
    """One rollout with the completions of ``rollouts`` in their order."""
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
