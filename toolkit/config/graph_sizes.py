"""For how many sequences at a time the engine captures CUDA graphs of a decode step."""

from __future__ import annotations

MOST = 1024
"""Graphs of more sequences save too little of the launches to be worth their memory."""


def graph_sizes(max_num_seqs: int, max_num_batched_tokens: int | None = None) -> list[int]:
    """Rising; a batch runs in the next larger one. 1, 2, 4, 8, then two sizes each time that the
    size doubles, and the largest batch that a rollout can have: vLLM's own list has a size for
    every 8 sequences, and none above 512.

    Padding costs little: a decode step reads all weights for one sequence as for many.
    """
    largest = min(max_num_seqs, max_num_batched_tokens or max_num_seqs, MOST)
    sizes = {1, 2, 4, 8, *(16 << step for step in range(7)), *(24 << step for step in range(6))}
    return sorted(size for size in sizes | {largest} if size <= largest)
