"""Prepare values for a chart: reduce the number of points, smooth the values, and choose the range
and the ticks of an axis.
"""

from __future__ import annotations

import math
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

Values = list[float | None]
MAX_POINTS = 400


def reduce_points(
    xs: Sequence[float], columns: Sequence[Sequence[float | None]]
) -> tuple[list[float], list[Values]]:
    """Reduce the number of points of each line to at most MAX_POINTS. ``columns`` has the values of
    each line. Return the new x values and columns.

    Several consecutive points are replaced by one point. It has the mean of their values, and the x
    value of the last point.
    """
    group_size = -(-len(xs) // MAX_POINTS) or 1
    starts = range(0, len(xs), group_size)
    means = [[mean(column[start : start + group_size]) for start in starts] for column in columns]
    return [xs[min(start + group_size, len(xs)) - 1] for start in starts], means


def smooth(values: Sequence[float | None], window: int) -> Values:
    """Smooth ``values`` with a centred moving median, then a moving mean. Missing values stay None.

    Without the median, the mean would turn a single spike into a plateau.
    """
    half = window // 2
    if not half:
        return list(values)
    medians: Values = [
        None if value is None else _median(values[max(0, i - half) : i + half + 1])
        for i, value in enumerate(values)
    ]
    return [
        None if value is None else mean(medians[max(0, i - half) : i + half + 1])
        for i, value in enumerate(medians)
    ]


def _median(values: Sequence[float | None]) -> float:
    return median(value for value in values if value is not None)


def smoothing_window(count: int) -> int:
    """Return the number of neighbouring points over which a line with ``count`` points is smoothed.

    The result is a fifteenth of ``count``. For fewer than 20 points it is 1 (no smoothing).
    """
    return max(1, count // 15) if count >= 20 else 1


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of the values that are not None. None if there are no such values."""
    known_values = [value for value in values if value is not None]
    return math.fsum(known_values) / len(known_values) if known_values else None


def axis_range(values: Sequence[float | None], *, from_zero: bool = False) -> tuple[float, float]:
    """The range (low, high) of an axis for the values.

    The range may exclude a few values that are far from all other values. With ``from_zero``, the
    range begins at 0 or below (for stacked areas).
    """
    known_values = sorted(value for value in values if value is not None)
    if not known_values:
        return 0.0, 1.0
    low, high = known_values[0], known_values[-1]
    if len(known_values) >= 50:
        inner_low, inner_high = (
            known_values[len(known_values) // 100],
            known_values[-1 - len(known_values) // 100],
        )
        margin = 3 * (inner_high - inner_low)
        if margin > 0:
            low, high = max(low, inner_low - margin), min(high, inner_high + margin)
    if from_zero:
        low = min(0.0, low)
    if high - low < 1e-12 * max(abs(high), abs(low), 1e-12) or high == low:
        pad = abs(high) * 0.1 or 1.0
        return (low if from_zero and low == 0 else low - pad), high + pad
    pad = 0.06 * (high - low)
    return (low if from_zero and low == 0 else low - pad), high + pad


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About ``count`` round numbers inside the range, for an axis."""
    raw_step = (high - low) / max(1, count)
    if not math.isfinite(raw_step) or raw_step <= 0:
        return []
    power = 10.0 ** math.floor(math.log10(raw_step))
    step = next((m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw_step), 10 * power)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def short_number(value: float | None, digits: int = 3) -> str:
    """A number in short form: 0.713, 12.3k, 4.0M, 1.5e-06."""
    if value is None:
        return "–"  # noqa: RUF001 - a dash for a missing value
    magnitude = abs(value)
    if magnitude >= 999_500_000 or 0 < magnitude < 5e-4:
        return f"{value:.{max(digits - 2, 0)}e}".replace("e-0", "e-").replace("e+", "e")
    for limit, letter in ((999_500, "M"), (9_995, "k")):
        if magnitude >= limit:
            scale = 1e6 if letter == "M" else 1e3
            return f"{value / scale:.{digits}g}{letter}"
    text = f"{value:.{digits}g}" if magnitude < 1000 else f"{value:.0f}"
    return text.replace("-0", "0") if float(text) == 0 else text


def tick_labels(values: Sequence[float]) -> list[str]:
    """The labels of the ticks, with enough digits to show the equal distances between the ticks."""
    for digits in range(3, 8):
        texts = [short_number(value, digits) for value in values]
        rounded = (float(f"{value:.{digits}g}") for value in values)
        if len(set(texts)) == len(texts) and all(map(math.isclose, rounded, values)):
            break
    return texts if values else []
