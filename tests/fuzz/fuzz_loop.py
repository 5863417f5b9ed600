"""What the fuzz scripts share: draw inputs in rounds on several processes, judge each, tell.

A judge raises AssertionError (or anything else) for an input that is not refused as it should be;
an input may take SECONDS_EACH of processor time, the process a number of megabytes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import time
from typing import TYPE_CHECKING, Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Callable

SECONDS_EACH = 2.0
ROUND = 1000

Round = tuple[int, float, float]  # inputs, the longest's seconds, peak megabytes

chunk = st.binary(max_size=6) | st.sampled_from([b"\0", b"\xff" * 8, b"\x7f" * 8, b"9" * 12, b"-"])
change = st.tuples(st.floats(0, 1), st.floats(0, 0.2), chunk, st.integers(0, 3))
Change = tuple[float, float, bytes, int]


def mutated(base: bytes, changes: list[Change]) -> bytes:
    """``base`` with pieces replaced: each change names where, how much goes, and what comes,
    repeated.
    """
    for where, share, piece, times in changes:
        start = int(where * len(base))
        end = start + int(share * share * len(base))
        base = base[:start] + piece * times + base[end:]
    return base


def timed(call: Callable[[], None]) -> float:
    """The seconds of processor time that ``call`` took, which are bounded."""
    start = time.process_time()
    call()
    took = time.process_time() - start
    assert took < SECONDS_EACH, f"{took:.1f} s for one input"
    return took


def attack(judge: Callable[..., float], count: int, number: int, *drawn: Any) -> Round:
    """One round of ``count`` inputs, drawn from seed ``number``."""
    done = {"inputs": 0, "longest": 0.0}

    @seed(number)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(st.tuples(*drawn))
    def one(values: tuple[Any, ...]) -> None:
        done["longest"] = max(done["longest"], judge(*values))
        done["inputs"] += 1

    one()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return int(done["inputs"]), done["longest"], peak


def main(
    round_of: Callable[[tuple[int, int]], Round], what: str, *, count: int, megabytes: float
) -> int:
    """Draw, judge, tell. ``round_of`` is a function of the script's module."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("count", nargs="?", type=int, default=count)
    parser.add_argument("--seconds", type=float, default=3600.0, help="stop drawing after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    asked = parser.parse_args()
    start = time.monotonic()
    # In rounds, so that the clock is looked at: hypothesis itself cannot be told to stop. A round
    # is drawn from its number, so that the inputs are the same with any number of workers.
    rounds = [
        (min(ROUND, asked.count - begin), asked.seed + begin)
        for begin in range(0, asked.count, ROUND)
    ]
    inputs, longest, peak = 0, 0.0, 0.0
    with multiprocessing.get_context("spawn").Pool(asked.workers) as pool:
        for found in pool.imap_unordered(round_of, rounds):
            inputs, longest, peak = inputs + found[0], max(longest, found[1]), max(peak, found[2])
            if time.monotonic() - start > asked.seconds:
                break
    took = time.monotonic() - start
    print(
        f"{what} {inputs} inputs in {took:.0f} s: no traceback, the longest took "
        f"{longest:.3f} s, peak {peak:.0f} MB"
    )
    return 0 if peak < megabytes else 1
