"""Draw charts as inline SVG, without a library, network requests or scripts.

The markup is safe HTML: the function ``escape`` escapes every text, and the function
``short_number`` or ``_coord`` formats every number.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from toolkit.train.report.axis import (
    Values,
    axis_range,
    reduce_points,
    short_number,
    smooth,
    smoothing_window,
    tick_labels,
    ticks,
)
from toolkit.train.report.markup import escape

if TYPE_CHECKING:
    from collections.abc import Sequence

LEFT, RIGHT, TOP, BOTTOM = 46, 14, 10, 24


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a chart, with one value per step. ``tone`` is a colour number (1 to 6)."""

    label: str
    values: Values
    tone: int = 1


@dataclass(frozen=True, kw_only=True)
class Chart:
    """The content of a chart.

    ``band`` is a shaded (low, high) range around the first line. ``dots`` are (x, y) marks beside
    the lines, for example evaluations. With ``stacked``, the lines are drawn as stacked areas. With
    ``exact``, the lines are not smoothed.
    """

    title: str
    note: str = ""
    xs: list[float]
    lines: list[Line]
    band: tuple[Values, Values] | None = None
    dots: list[tuple[float, float]] = field(default_factory=list)
    dots_label: str = ""
    stacked: bool = False
    exact: bool = False
    wide: bool = False


@dataclass(frozen=True)
class Frame:
    """The size of a chart's picture and the ranges of its axes. Converts values to positions in
    the picture.
    """

    width: float
    height: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        """The x position of a step in the picture."""
        low, high = self.x_range
        return LEFT + (value - low) / (high - low) * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """The y position of a value in the picture.

        A value far outside the range of the axis gets a position just outside the plot, where the
        browser does not draw it.
        """
        low, high = self.y_range
        share = min(max((value - low) / (high - low), -0.5), 1.5)
        return TOP + (1 - share) * (self.height - TOP - BOTTOM)


def chart_html(chart: Chart, number: int) -> str:
    """Return a chart as HTML: heading, legend and picture. ``number`` is a different number for
    each chart of the page, for unique HTML ids.
    """
    band = list(chart.band) if chart.band else []
    xs, columns = reduce_points(chart.xs, [*(line.values for line in chart.lines), *band])
    lines, band = columns[: len(chart.lines)], columns[len(chart.lines) :]
    heights = _stacked_heights(lines) if chart.stacked else lines
    plotted_values = [value for column in [*heights, *band] for value in column]
    plotted_values += [y for _, y in chart.dots]
    width, height = (1000, 260) if chart.wide else (480, 190)
    all_xs = [*xs, *(x for x, _ in chart.dots)]
    first, last = min(all_xs), max(all_xs)
    x_range = (first, last) if last > first else (first - 0.5, first + 0.5)
    frame = Frame(width, height, x_range, axis_range(plotted_values, from_zero=chart.stacked))
    body = (
        _stacked_svg(frame, xs, heights, chart)
        if chart.stacked
        else _lines_svg(frame, xs, lines, chart)
    )
    if band:
        body = area_svg(frame, xs, band[0], band[1], "band t1") + body
    body += "".join(
        f'<circle class="mark" cx="{_coord(frame.x(x))}" cy="{_coord(frame.y(y))}" r="3.5"/>'
        for x, y in chart.dots
    )
    points_json = json.dumps(
        {
            "x": [_rounded(x) for x in xs],
            "px": [round(frame.x(x), 1) for x in xs],
            "y": [[_rounded(v) for v in column] for column in lines],
            "py": [[None if v is None else round(frame.y(v), 1) for v in c] for c in heights],
        },
        separators=(",", ":"),
    )
    clip = f"clip{number}"
    plot = (
        f'x="{LEFT}" y="{TOP - 4}" width="{width - LEFT - RIGHT + 5}" '
        f'height="{height - TOP - BOTTOM + 8}"'
    )
    return (
        f'<figure class="card chart{" wide" if chart.wide else ""}">'
        f"<figcaption><h3>{escape(chart.title)}</h3><p class=note>{escape(chart.note)}</p>"
        f"{_legend(chart)}</figcaption>"
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(chart.title)}" '
        f'data-points="{escape(points_json)}">'
        f'<defs><clipPath id="{clip}"><rect {plot}/></clipPath></defs>'
        f'{grid_svg(frame)}<g clip-path="url(#{clip})">{body}</g></svg></figure>'
    )


def _lines_svg(frame: Frame, xs: list[float], lines: list[Values], chart: Chart) -> str:
    """Return the SVG of the lines. Each smoothed line is drawn over a faint line of the raw values.

    If the values before and after a point are missing, the point is drawn as a dot.
    """
    window = 1 if chart.exact else smoothing_window(len(xs))
    elements = []
    for line, values in zip(chart.lines, lines, strict=True):
        if window > 1:
            elements.append(f'<path class="raw t{line.tone}" d="{line_path(frame, xs, values)}"/>')
        smoothed = smooth(values, window)
        elements.append(f'<path class="line t{line.tone}" d="{line_path(frame, xs, smoothed)}"/>')
        elements += [
            f'<circle class="point t{line.tone}" cx="{_coord(frame.x(xs[i]))}" '
            f'cy="{_coord(frame.y(value))}" r="2.5"/>'
            for i, value in enumerate(values)
            if value is not None and _is_isolated(values, i)
        ]
    return "".join(elements)


def _stacked_svg(frame: Frame, xs: list[float], heights: list[Values], chart: Chart) -> str:
    lower_edge: Values = [0.0] * len(xs)
    elements = []
    for line, upper_edge in zip(chart.lines, heights, strict=True):
        elements.append(area_svg(frame, xs, lower_edge, upper_edge, f"stack t{line.tone}"))
        lower_edge = upper_edge
    return "".join(elements)


def area_svg(frame: Frame, xs: Sequence[float], low: Values, high: Values, css_class: str) -> str:
    """Return the SVG of the area between the lines ``low`` and ``high``. Where a value is missing,
    the area has a gap.
    """
    segments: list[list[int]] = [[]]
    for index in range(len(xs)):
        if low[index] is None or high[index] is None:
            segments.append([])
        else:
            segments[-1].append(index)
    path = ""
    for segment in segments:
        upper_points = [(frame.x(xs[i]), frame.y(high[i] or 0.0)) for i in segment]
        lower_points = [(frame.x(xs[i]), frame.y(low[i] or 0.0)) for i in reversed(segment)]
        if len(segment) > 1:
            path += (
                "M"
                + "L".join(f"{_coord(x)} {_coord(y)}" for x, y in upper_points + lower_points)
                + "Z"
            )
    return f'<path class="{css_class}" d="{path}"/>'


def line_path(frame: Frame, xs: Sequence[float], values: Values) -> str:
    """The attribute ``d`` of an SVG path through the values. A missing value leaves a gap."""
    pen, path = "M", ""
    for x, value in zip(xs, values, strict=True):
        if value is None:
            pen = "M"
            continue
        path += f"{pen}{_coord(frame.x(x))} {_coord(frame.y(value))}"
        pen = "L"
    return path


def _is_isolated(values: Values, index: int) -> bool:
    """Whether the values before and after a point are missing. A line would not show this point."""
    before = values[index - 1] if index else None
    after = values[index + 1] if index + 1 < len(values) else None
    return before is None and after is None


def grid_svg(frame: Frame, axis: str = "step") -> str:
    """Return the SVG of the grid lines and of the numbers at both axes. ``axis`` is the name of the
    x axis.
    """
    right, floor = frame.width - RIGHT, frame.height - BOTTOM
    elements = []
    tick_values = ticks(*frame.y_range)
    for value, label in zip(tick_values, tick_labels(tick_values), strict=True):
        y = frame.y(value)
        css_class = "zero" if value == 0 else "grid"
        elements.append(
            f'<line class="{css_class}" x1="{LEFT}" x2="{right}" '
            f'y1="{_coord(y)}" y2="{_coord(y)}"/>'
            f'<text class="y" x="{LEFT - 7}" y="{_coord(y + 3.5)}">{escape(label)}</text>'
        )
    elements.append(f'<text class="y" x="{LEFT - 7}" y="{floor + 16}">{escape(axis)}</text>')
    low, high = frame.x_range
    for value in ticks(low, high, 8 if frame.width > 600 else 5):
        if value == int(value) and frame.x(value) > LEFT + 12:
            elements.append(
                f'<text class="x" x="{_coord(frame.x(value))}" y="{floor + 16}">{int(value)}</text>'
            )
    return "".join(elements)


def _legend(chart: Chart) -> str:
    """Return the legend as HTML. It has the last value of each line. If the chart is wide or has
    several lines, the legend also has the names of the lines.
    """
    items = []
    for line in chart.lines:
        known_values = [value for value in line.values if value is not None]
        name = f"<span>{escape(line.label)}</span>" if len(chart.lines) > 1 or chart.wide else ""
        last = escape(short_number(known_values[-1] if known_values else None))
        items.append(f'<li class="t{line.tone}"><i></i>{name}<b>{last}</b></li>')
    if chart.dots:
        items.append(f'<li class="mark"><i></i><span>{escape(chart.dots_label)}</span></li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


def _stacked_heights(lines: list[Values]) -> list[Values]:
    """Return the upper edges of the stacked areas: the sum of each line and all lines before it. A
    missing value counts as 0.
    """
    heights: list[Values] = []
    lower_edge = [0.0] * (len(lines[0]) if lines else 0)
    for values in lines:
        lower_edge = [
            base + max(0.0, value or 0.0) for base, value in zip(lower_edge, values, strict=True)
        ]
        heights.append([*lower_edge])
    return heights


def _coord(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")
