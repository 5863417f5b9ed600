"""What overlap, speculative decoding and over-sampling could save at most, by arithmetic: `python
tests/bench/bound_overlap.py`. docs/rollout-bounds.md shows the result for 8B, uneven lengths.

Lengths are geometric and cut off. A decode step takes the same time for one sequence as for all:
8B measured 6.9 ms for 8 sequences and 7.8 ms for 64.
"""

from __future__ import annotations

import argparse

import numpy as np

DRAWS = 4000


def lengths(draw: np.random.Generator, sequences: int, mean: int, most: int) -> np.ndarray:
    """(draws, sequences) tokens."""
    return np.minimum(draw.geometric(1 / mean, size=(DRAWS, sequences)), most)


def overlap(lengths_DGN: np.ndarray, step_s: float, training_s: float) -> tuple[float, float]:
    """(seconds of a step, seconds with overlap that costs nothing): a group is trained when its
    last completion has ended, one group after another.
    """
    tokens_DG = lengths_DGN.sum(2)
    work_DG = training_s * tokens_DG / tokens_DG.sum(1).mean()
    ends_DG = step_s * lengths_DGN.max(2)
    order = np.argsort(ends_DG, 1)
    ready = np.zeros(len(ends_DG))
    for group in order.T:
        rows = np.arange(len(group))
        ready = np.maximum(ready, ends_DG[rows, group]) + work_DG[rows, group]
    return float((ends_DG.max(1) + work_DG.sum(1)).mean()), float(ready.mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--mean", type=int, default=500)
    parser.add_argument("--most", type=int, default=2048)
    parser.add_argument("--rollout-s", type=float, default=16.0)
    parser.add_argument("--training-s", type=float, default=2.6)
    parser.add_argument("--step-s", type=float, default=18.6)
    given = parser.parse_args()
    draw = np.random.default_rng(0)
    count = given.groups * given.group_size
    all_DN = lengths(draw, count, given.mean, given.most)
    decode_s = given.rollout_s / given.most
    print(f"mean length {all_DN.mean():.0f}; the longest reaches {given.most} in")
    print(f"{(all_DN.max(1) == given.most).mean():.0%} of the steps; on average")
    print(f"{all_DN.sum(1).mean() / given.most:.1f} of {count} sequences decode")
    plain, best = overlap(
        all_DN.reshape(DRAWS, given.groups, given.group_size), decode_s, given.training_s
    )
    print(f"overlap, at no cost: {plain:.1f} -> {best:.1f} s, {1 - best / plain:.0%}")
    for lost in (0.25, 0.5, 1.0):
        slower = best + lost * given.training_s
        print(f"  decoding loses {lost:.0%} of the training time: {1 - slower / plain:.0%}")
    need = given.rollout_s / (given.rollout_s - 0.15 * given.step_s)
    print(f"speculation: 15 % of a step needs {need:.2f} tokens for the time of one decode step")
    for started in (count * 9 // 8, count * 5 // 4, count * 3 // 2):
        kept = np.sort(lengths(draw, started, given.mean, given.most), 1)[:, :count]
        seconds = decode_s * kept.max(1).mean() + given.training_s * kept.mean() / all_DN.mean()
        print(f"over-sampling {started}: mean kept {kept.mean():.0f} tokens, step {seconds:.1f} s")


if __name__ == "__main__":
    main()
