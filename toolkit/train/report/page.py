"""Build the HTML page of the report: one file that makes no network requests. It can be read
without scripts.

The page has a content security policy that allows only its own style sheet and script (by their
hashes). Therefore a text that the toolkit did not escape could not run scripts, or load or send
data.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.base.version import __version__
from toolkit.train.report import chart, curves, samples, sections
from toolkit.train.report.log_files import section
from toolkit.train.report.markup import escape

if TYPE_CHECKING:
    from toolkit.train.report.log_files import RunFiles

_FOLDER = Path(__file__).parent


def render(run: RunFiles) -> str:
    """The report of a run as HTML."""
    style = (_FOLDER / "page.css").read_text(encoding="utf-8")
    script = (_FOLDER / "page.js").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; style-src '{_csp_hash(style)}'; script-src '{_csp_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    css_class, status_text = sections.status(run)
    model = section(run.config, "model").get("model_name") or "unknown model"
    reward, others = curves.reward_chart(run), curves.other_charts(run)
    charts = sections.evaluation(run) + "".join(
        chart.chart_html(item, number) for number, item in enumerate(others, start=1)
    )
    setup_html = sections.settings_table(run) + sections.provenance(run) + sections.memory(run)
    body_parts = [
        f"<header><div><h1>{escape(run.name)}</h1><p class=note>{escape(model)}</p></div>"
        f"<span class='status {css_class}'>{escape(status_text)}</span></header>",
        sections.tiles(run),
        sections.notices(run),
        chart.chart_html(reward, 0) if reward else _no_curves_note(run),
        f"<div class=grid>{charts}</div>" if charts else "",
        samples.samples_html(run),
        f"<h2>How it was run</h2><div class=grid>{setup_html}</div>" if setup_html else "",
        sections.full_documents(run),
        f"<footer>grpo-toolkit {escape(__version__)}: this file is self-contained</footer>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        '<meta name="referrer" content="no-referrer">'
        f"<title>{escape(run.name)}</title><style>{style}</style></head>\n<body><main>"
        + "\n".join(part for part in body_parts if part)
        + f"</main>\n<script>{script}</script></body></html>\n"
    )


def _no_curves_note(run: RunFiles) -> str:
    reason = "no reward was logged" if run.metrics else "no step has been logged yet"
    return f"<section class=card><p class=note>There are no curves to show: {reason}.</p></section>"


def _csp_hash(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"
