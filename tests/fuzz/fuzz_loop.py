"""The loop of the fuzz scripts. It draws inputs in rounds on several processes, checks each input,
and prints the result.

``check_input`` raises AssertionError or another exception if a reader does not refuse an input as
it should. An input may take MAX_SECONDS_PER_INPUT of processor time. The memory of a process is
limited to a number of megabytes.
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

MAX_SECONDS_PER_INPUT = 2.0
INPUTS_PER_ROUND = 1000

Round = tuple[int, float, float]  # number of inputs, seconds of the longest, peak megabytes

chunk = st.binary(max_size=6) | st.sampled_from([b"\0", b"\xff" * 8, b"\x7f" * 8, b"9" * 12, b"-"])
change = st.tuples(st.floats(0, 1), st.floats(0, 0.2), chunk, st.integers(0, 3))
Change = tuple[float, float, bytes, int]


def mutate(base: bytes, changes: list[Change]) -> bytes:
    """``base`` with pieces replaced. A change has the relative position, the square root of the
    share that is removed, the piece that is inserted, and the number of its repetitions.
    """
    for where, share, piece, times in changes:
        start = int(where * len(base))
        end = start + int(share * share * len(base))
        base = base[:start] + piece * times + base[end:]
    return base


def measure_seconds(call: Callable[[], None]) -> float:
    """Run ``call``, and return its processor time in seconds, which must be below the limit."""
    start = time.process_time()
    call()
    elapsed_s = time.process_time() - start
    assert elapsed_s < MAX_SECONDS_PER_INPUT, f"{elapsed_s:.1f} s for one input"
    return elapsed_s


def run_inputs(
    check_input: Callable[..., float], count: int, seed_number: int, *strategies: Any
) -> Round:
    """Check one round of ``count`` inputs that are drawn with the seed ``seed_number``."""
    progress = {"inputs": 0, "longest": 0.0}

    @seed(seed_number)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(st.tuples(*strategies))
    def check_one_input(values: tuple[Any, ...]) -> None:
        progress["longest"] = max(progress["longest"], check_input(*values))
        progress["inputs"] += 1

    check_one_input()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return int(progress["inputs"]), progress["longest"], peak


def main(
    run_round: Callable[[tuple[int, int]], Round], description: str, *, count: int, megabytes: float
) -> int:
    """Run ``run_round`` of a script on all inputs, print the result, and return the exit code."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("count", nargs="?", type=int, default=count)
    parser.add_argument("--seconds", type=float, default=3600.0, help="stop drawing after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    start = time.monotonic()
    # hypothesis has no time limit for all inputs, so the time is checked after each round. The seed
    # of a round follows from its number, so the inputs are the same with any number of workers.
    rounds = [
        (min(INPUTS_PER_ROUND, arguments.count - begin), arguments.seed + begin)
        for begin in range(0, arguments.count, INPUTS_PER_ROUND)
    ]
    inputs, longest, peak = 0, 0.0, 0.0
    with multiprocessing.get_context("spawn").Pool(arguments.workers) as pool:
        for round_result in pool.imap_unordered(run_round, rounds):
            inputs, longest, peak = (
                inputs + round_result[0],
                max(longest, round_result[1]),
                max(peak, round_result[2]),
            )
            if time.monotonic() - start > arguments.seconds:
                break
    elapsed_s = time.monotonic() - start
    print(
        f"{description} {inputs} inputs in {elapsed_s:.0f} s: no traceback, the longest took "
        f"{longest:.3f} s, peak {peak:.0f} MB"
    )
    return 0 if peak < megabytes else 1
