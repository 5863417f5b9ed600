"""Escape text for HTML, and build small pieces of HTML. Text from a model is untrusted, so it must
be escaped here.
"""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from toolkit.base.formatting import escape_unprintable
from toolkit.base.secrets import redact

if TYPE_CHECKING:
    from collections.abc import Iterable


def escape(value: object) -> str:
    """Escape ``value`` for an HTML element or a quoted attribute. Secrets are removed."""
    redacted = redact(value if isinstance(value, str) else str(value))
    return html.escape(escape_unprintable(redacted), quote=True)


def html_table(rows: Iterable[tuple[str, str]], css_class: str = "facts") -> str:
    """Return an HTML table of the rows (name, cell). This function escapes the names. The cells
    must be HTML already.
    """
    body = "".join(f"<tr><th>{escape(name)}</th><td>{cell}</td></tr>" for name, cell in rows)
    return f'<table class="{css_class}">{body}</table>' if body else ""


def collapsible(summary: str, inner: str) -> str:
    """An HTML section that opens when its ``summary`` is clicked. It needs no script."""
    return (
        f"<details class=card><summary>{escape(summary)}</summary>{inner}</details>"
        if inner
        else ""
    )


def escape_start(value: str, limit: int) -> str:
    """Return the first ``limit`` characters of ``value``, escaped. If ``value`` is longer, the
    number of omitted characters is appended.
    """
    if len(value) <= limit:
        return escape(value)
    return f"{escape(value[:limit])}<i class=more> … {len(value) - limit} more characters</i>"


def flat_rows(value: object, prefix: str = "") -> list[tuple[str, str]]:
    """Return a nested mapping as table rows (key, HTML cell). Nested keys are joined by dots."""
    if isinstance(value, dict) and value:
        return [row for key, item in value.items() for row in flat_rows(item, f"{prefix}{key}.")]
    shown = "–" if value in (None, {}, [], "") else escape(_plain_text(value))  # noqa: RUF001
    return [(prefix.removesuffix("."), f"<code>{shown}</code>")]


def _plain_text(value: object) -> str:
    if isinstance(value, list) and all(not isinstance(item, dict | list) for item in value):
        return ", ".join(_plain_text(item) for item in value)
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value)
