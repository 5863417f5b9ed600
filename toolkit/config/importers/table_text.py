"""The migration table of a format, in Markdown, for documentation."""

from __future__ import annotations

from toolkit.config.importers.formats import table


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
        lines.append(f"| `{row.old}` | {to} | {row.kind} | {row.why.replace('|', '/')} |")
    return "\n".join(lines) + "\n"
