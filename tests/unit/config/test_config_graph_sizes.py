"""The batch sizes for which CUDA graphs are captured."""

from __future__ import annotations

import pytest

from toolkit.config.engine_settings import MAX_GRAPH_SIZE, graph_sizes


def test_a_few_sizes_up_to_the_largest_batch():
    assert graph_sizes(64) == [1, 2, 4, 8, 16, 24, 32, 48, 64]
    assert graph_sizes(50) == [1, 2, 4, 8, 16, 24, 32, 48, 50]
    assert graph_sizes(1) == [1]
    assert graph_sizes(4096)[-1] == MAX_GRAPH_SIZE
    assert graph_sizes(64, 40)[-1] == 40


@pytest.mark.parametrize("sequences", range(1, 300, 7))
def test_every_batch_has_a_graph_that_is_not_twice_as_large(sequences):
    sizes = graph_sizes(sequences)
    assert sizes == sorted(set(sizes))
    for batch in range(1, sequences + 1):
        graph = next(size for size in sizes if size >= batch)
        assert graph < 2 * batch
