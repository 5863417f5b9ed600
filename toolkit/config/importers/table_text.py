"""The migration table of a format, in Markdown, for documentation."""

from __future__ import annotations

from toolkit.config.importers.formats import table
from toolkit.config.importers.mapping import Row


def _fine(row: Row) -> str:
    """The values of a refused key that ask for nothing, beside those that mean "off"."""
    usual = Row._field_defaults["off"]
    return ", ".join(str(one) for one in row.off if one not in usual) if row.refused else ""


def markdown(form: str) -> str:
    """One line a key: its name there, its name here, what happens, and why."""
    found = table(form)
    lines = [
        f"Keys of {found.title}, and what `toolkit import` makes of them.",
        "",
        "| key there | key here | what happens | why |",
        "| --- | --- | --- | --- |",
    ]
    for row in found.rows:
        to = f"`{row.to}`" if row.to else ""
        why = row.why + (f"; fine with {fine}" if (fine := _fine(row)) else "")
        lines.append(f"| `{row.old}` | {to} | {row.kind} | {why.replace('|', '/')} |")
    return "\n".join(lines) + "\n"
