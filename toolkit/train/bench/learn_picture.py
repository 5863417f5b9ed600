"""Draw the learning curves of ``bench --learn`` in one SVG file: accuracy over training time and
over optimizer steps.

The picture is drawn with the chart functions of the report (train/report/chart). The file contains
its style sheet, has no scripts, and loads no other file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.train.bench.learn_settings import LABELS, headline
from toolkit.train.report.chart import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    Frame,
    area_svg,
    grid_svg,
    line_path,
)
from toolkit.train.report.markup import escape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from toolkit.train.bench.learn_settings import Curve

WIDTH, HEIGHT = 1000, 420
PANEL_WIDTH, PANEL_HEIGHT, PANEL_TOP, GAP = 490, 310, 96, 20
COLOURS = {"ours": "#0f766e", "trl": "#c2410c", "unsloth": "#6d28d9"}
STYLE = """
text{font:13px system-ui,sans-serif;fill:#334155}.title{font-size:17px;font-weight:700;fill:#0f172a}
.note{fill:#64748b}.panel{font-weight:600;fill:#0f172a}.x{text-anchor:middle}.y{text-anchor:end}
.grid,.zero{stroke:#e2e8f0}.target{stroke:#0f172a;stroke-dasharray:5 4}
.line{fill:none;stroke-width:2.5}
.band{opacity:.16}.legend{font-weight:600}
"""


def draw_curves(arm_curves: Sequence[Curve], target: float, note: str) -> str:
    """Return the picture as the text of an SVG file. It has the headline, a legend and two charts.
    In each chart, an arm has a line for its mean accuracy, and a band from the lowest to the
    highest accuracy of its seeds. A dashed line shows the target accuracy.
    """
    title = headline(arm_curves, target)
    parts = [
        f'<text class="title" x="20" y="32">{escape(title)}</text>',
        f'<text class="note" x="20" y="54">{escape(note)}</text>',
        _legend(arm_curves),
        _panel(arm_curves, target, 0, "training time", "s"),
        _panel(arm_curves, target, 1, "optimizer steps", "step"),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'role="img" aria-label="{escape(title)}"><style>{STYLE}</style>'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def _panel(arm_curves: Sequence[Curve], target: float, index: int, title: str, axis: str) -> str:
    """Return the chart of the accuracy over seconds (``index`` 0) or over optimizer steps
    (``index`` 1).
    """
    x_values = [list(map(float, (curve.seconds, curve.steps)[index])) for curve in arm_curves]
    last = max((xs[-1] for xs in x_values if xs), default=0.0) or 1.0
    highest = max([target, *(value for curve in arm_curves for value in curve.high)])
    frame = Frame(PANEL_WIDTH, PANEL_HEIGHT, (0.0, last), (0.0, min(1.0, 1.1 * highest)))
    y = f"{frame.y(target):.1f}"
    body = [
        f'<text class="panel" x="{LEFT}" y="0">Held-out accuracy against {escape(title)}</text>',
        grid_svg(frame, axis),
        f'<line class="target" x1="{LEFT}" x2="{PANEL_WIDTH - RIGHT}" y1="{y}" y2="{y}"/>',
    ]
    for curve, xs in zip(arm_curves, x_values, strict=True):
        colour = COLOURS[curve.arm]
        band = area_svg(frame, xs, list(curve.low), list(curve.high), "band")
        path = line_path(frame, xs, list(curve.mean))
        body.append(f'<g fill="{colour}">{band}</g>')
        body.append(f'<path class="line" stroke="{colour}" d="{path}"/>')
        reached = (curve.to_target_s, curve.to_target_step)[index]
        if reached is not None:
            x = f"{frame.x(reached):.1f}"
            floor = PANEL_HEIGHT - BOTTOM
            body.append(
                f'<line x1="{x}" x2="{x}" y1="{y}" y2="{floor}" stroke="{colour}"/>'
                f'<circle cx="{x}" cy="{y}" r="4.5" fill="{colour}"/>'
            )
    left = 10 + index * (PANEL_WIDTH + GAP - 10)
    return f'<g transform="translate({left},{PANEL_TOP - TOP + 14})">{"".join(body)}</g>'


def _legend(arm_curves: Sequence[Curve]) -> str:
    parts, x = [], 20
    for curve in arm_curves:
        last = f"{curve.mean[-1]:.0%}" if curve.mean else "not measured"
        label = f"{LABELS[curve.arm]}: {last} at step {curve.steps[-1] if curve.steps else 0}"
        parts.append(
            f'<rect x="{x}" y="66" width="14" height="14" rx="3" fill="{COLOURS[curve.arm]}"/>'
            f'<text class="legend" x="{x + 20}" y="78">{escape(label)}</text>'
        )
        x += 40 + 8 * len(label)
    return "".join(parts)
