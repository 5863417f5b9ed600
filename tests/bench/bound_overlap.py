"""Compute what overlap, speculative decoding and over-sampling could save at most: `python
tests/bench/bound_overlap.py`. docs/rollout-bounds.md shows the result for 8B and uneven lengths.

The lengths have a geometric distribution with a maximum. A decode step takes the same time for one
sequence as for all: with 8B, the measured times were 6.9 ms for 8 sequences and 7.8 ms for 64.
"""

from __future__ import annotations

import argparse

import numpy as np

SIMULATED_STEPS = 4000


def sample_lengths(
    draw: np.random.Generator, sequences: int, mean: int, max_length: int
) -> np.ndarray:
    """The lengths in tokens, with the shape (SIMULATED_STEPS, sequences)."""
    return np.minimum(draw.geometric(1 / mean, size=(SIMULATED_STEPS, sequences)), max_length)


def overlapped_seconds(
    lengths_DGN: np.ndarray, step_s: float, training_s: float
) -> tuple[float, float]:
    """(mean seconds of a step without overlap, mean seconds with overlap that has no cost). With
    overlap, a group is trained as soon as its last completion has ended and the previous group is
    trained.
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
    options = parser.parse_args()
    draw = np.random.default_rng(0)
    count = options.groups * options.group_size
    all_DN = sample_lengths(draw, count, options.mean, options.most)
    decode_s = options.rollout_s / options.most
    print(f"mean length {all_DN.mean():.0f}; the longest reaches {options.most} in")
    print(f"{(all_DN.max(1) == options.most).mean():.0%} of the steps; on average")
    print(f"{all_DN.sum(1).mean() / options.most:.1f} of {count} sequences decode")
    plain_s, overlap_s = overlapped_seconds(
        all_DN.reshape(SIMULATED_STEPS, options.groups, options.group_size),
        decode_s,
        options.training_s,
    )
    print(f"overlap, at no cost: {plain_s:.1f} -> {overlap_s:.1f} s, {1 - overlap_s / plain_s:.0%}")
    for lost in (0.25, 0.5, 1.0):
        slower = overlap_s + lost * options.training_s
        print(f"  decoding loses {lost:.0%} of the training time: {1 - slower / plain_s:.0%}")
    tokens = options.rollout_s / (options.rollout_s - 0.15 * options.step_s)
    print(f"speculation: 15 % of a step needs {tokens:.2f} tokens for the time of one decode step")
    for started in (count * 9 // 8, count * 5 // 4, count * 3 // 2):
        kept_DN = np.sort(sample_lengths(draw, started, options.mean, options.most), 1)[:, :count]
        seconds = (
            decode_s * kept_DN.max(1).mean() + options.training_s * kept_DN.mean() / all_DN.mean()
        )
        print(
            f"over-sampling {started}: mean kept {kept_DN.mean():.0f} tokens, step {seconds:.1f} s"
        )


if __name__ == "__main__":
    main()
