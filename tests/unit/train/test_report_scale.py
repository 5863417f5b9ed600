"""The axes of the report: value ranges, ticks, smoothing, fewer points, and short numbers."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.train.report import axis

VALUES = st.lists(st.none() | st.floats(-1e120, 1e120), max_size=80)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"), (1, "1"), (0.7134, "0.713"), (-0.01191, "-0.0119"), (128.4, "128"),
        (2704.4, "2704"),
        (12345, "12.3k"), (999_999, "1M"), (4.0e6, "4M"), (5e-6, "5.0e-6"), (0.0005, "0.0005"),
        (1e-300, "1.0e-300"), (2.5e12, "2.5e12"), (None, "\u2013"), (-0.0, "0"), (42.5, "42.5"),
    ],
)  # fmt: skip
def test_short_number(value: float | None, shown: str) -> None:
    assert axis.short_number(value) == shown


@given(VALUES)
def test_the_axis_range_contains_the_values_and_the_ticks(values: list[float | None]) -> None:
    low, high = axis.axis_range(values)
    assert math.isfinite(low)
    assert math.isfinite(high)
    assert low < high
    there = [value for value in values if value is not None]
    if there and len(there) < 50:
        assert low <= min(there) <= max(there) <= high
    marks = axis.ticks(low, high)
    assert len(marks) <= 12
    slack = (high - low) * 1e-6
    assert all(low - slack <= mark <= high + slack for mark in marks)


def test_a_spike_does_not_flatten_the_curve() -> None:
    values: list[float | None] = [math.sin(i / 9) for i in range(200)]
    values[100] = 1e6
    assert axis.axis_range(values)[1] < 10
    assert max(value or 0 for value in axis.smooth(values, 13)) < 1.1


def test_ticks_are_round() -> None:
    assert axis.ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1.0]
    assert axis.ticks(-0.07, 0.31) == [0, 0.1, 0.2, 0.3]
    assert axis.ticks(1, 300, 5) == [100, 200, 300]
    assert axis.ticks(3, 3) == []
    assert axis.tick_labels([41.0, 41.05, 41.1]) == ["41", "41.05", "41.1"]
    assert axis.tick_labels([0.69325, 0.6935, 0.69375]) == ["0.69325", "0.6935", "0.69375"]
    assert axis.tick_labels([12_250.0, 12_500.0]) == ["12.25k", "12.5k"]


def test_smoothing_keeps_gaps_and_constants() -> None:
    assert axis.smooth([1.0, None, 1.0, 1.0], 3) == [1.0, None, 1.0, 1.0]
    assert axis.smooth([1.0, 5.0], 1) == [1.0, 5.0]
    assert axis.smoothing_window(5) == 1
    assert axis.smoothing_window(300) == 20


@given(st.integers(1, 3000))
def test_thinning_keeps_the_end_and_the_mean(count: int) -> None:
    xs = [float(i) for i in range(1, count + 1)]
    thinned, (column,) = axis.reduce_points(xs, [xs])
    assert len(thinned) == len(column) <= axis.MAX_POINTS
    assert thinned[-1] == count
    assert thinned == sorted(set(thinned))


def test_thinning_ignores_gaps() -> None:
    xs = [float(i) for i in range(800)]
    _, (column,) = axis.reduce_points(xs, [[None, 4.0] * 400])
    assert set(column) == {4.0}
