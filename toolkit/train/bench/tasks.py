"""Make arithmetic problems with answers from a seed: training problems, and held-out problems that
are never used for training.

A problem is held out if the first byte of a hash of its question is a multiple of 8. This does not
depend on the seed. So training problems and held-out problems are disjoint for every seed, and the
held-out problems are the same for all seeds.
"""

from __future__ import annotations

import random
from hashlib import sha256
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

HELD_OUT_ONE_IN = 8
MAX_HELD_OUT = 1000
"""The largest number of held-out problems that can be drawn. Every task has more than this."""


class Problem(NamedTuple):
    """A question and the number that answers it."""

    question: str
    answer: str


def _sum_problem(rng: random.Random) -> Problem:
    """Return a problem that adds or subtracts two or three numbers up to 30. Its answer is not
    negative.
    """
    while True:
        values = [rng.randint(1, 30) for _ in range(rng.choice((2, 2, 3)))]
        signs = [rng.choice((1, 1, -1)) for _ in values[1:]]
        total = values[0] + sum(s * v for s, v in zip(signs, values[1:], strict=True))
        if total >= 0:
            terms = (
                f" {'+' if s > 0 else '-'} {v}" for s, v in zip(signs, values[1:], strict=True)
            )
            return Problem(f"What is {values[0]}{''.join(terms)}?", str(total))


def _largest_problem(rng: random.Random) -> Problem:
    values = rng.sample(range(1, 100), 4)
    listed = f"{', '.join(map(str, values[:-1]))} or {values[-1]}"
    return Problem(f"Which number is the largest: {listed}?", str(max(values)))


TASKS: Mapping[str, Callable[[random.Random], Problem]] = MappingProxyType(
    {"sums": _sum_problem, "largest": _largest_problem}
)


def training_problems(task: str, count: int, seed: int) -> list[Problem]:
    """Return ``count`` training problems. The same problem may occur more than once."""
    return _draw(task, count, f"train {seed}", held_out=False)


def held_out_problems(task: str, count: int) -> list[Problem]:
    """Return ``count`` different held-out problems. ``count`` is at most ``MAX_HELD_OUT``."""
    return _draw(task, count, "held out", held_out=True)


def is_held_out(question: str) -> bool:
    """Return True if the problem with this question is held out."""
    return sha256(question.encode()).digest()[0] % HELD_OUT_ONE_IN == 0


def _draw(task: str, count: int, seed: str, *, held_out: bool) -> list[Problem]:
    rng = random.Random(f"{task} {seed}")
    problems: list[Problem] = []
    seen: set[Problem] = set()
    while len(problems) < count:
        problem = TASKS[task](rng)
        if is_held_out(problem.question) != held_out or (held_out and problem in seen):
            continue
        seen.add(problem)
        problems.append(problem)
    return problems
