"""Write a translation as the text of a run file. A comment on each line names the setting from
which the line was made. This module also writes the table of a format for the documentation.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.base.formatting import escape_unprintable
from toolkit.base.secrets import redact
from toolkit.config.importers.formats import table
from toolkit.config.importers.mapping import Row, Written
from toolkit.config.wording import spell_value

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from toolkit.config.importers.mapping import Omission, Translation

SECTIONS = ("model", "lora", "dataset", "reward", "grpo", "runtime")
_LONGEST = 240
_PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def run_file_text(made: Translation, name: str) -> str:
    """Return the text of the run file in YAML. ``name`` is the name of the other tool's file."""
    if "runtime.output_dir" not in made.written:
        stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(name).stem).strip("-") or "run"
        made.written["runtime.output_dir"] = Written(
            f"runs/{stem}", "the original names no output folder"
        )
    lines = [f"# Made from {_one_line(name)} ({made.table.title}) by toolkit import."]
    lines += [f"# {_one_line(note)}" for note in made.notes]
    for section in SECTIONS:
        body = list(_section(made, section))
        if body:
            lines += ["", f"{section}:", *body]
    lines += _block("Not supported here, so the run differs from the original:", made.refused)
    lines += _unread(made)
    lines += _block("Left out, because a run does not need these settings:", made.left_out)
    return "\n".join(lines) + "\n"


def _section(made: Translation, section: str) -> Iterator[str]:
    if section == "reward" and made.rewards:
        yield "  functions:"
        for reward, note in zip(made.rewards, made.reward_notes, strict=True):
            yield f"    - {flow(reward)}  # {_one_line(note)}"
    nested: dict[str, list[str]] = {}
    for key, found in made.written.items():
        head, _, rest = key.partition(".")
        if head != section:
            continue
        outer, _, inner = rest.partition(".")
        if inner:
            text = f"    {inner}: {flow(found.value)}  # {_one_line(found.why)}"
            nested.setdefault(outer, []).append(text)
        else:
            yield f"  {rest}: {flow(found.value)}  # {_one_line(found.why)}"
    for outer, texts in nested.items():
        yield f"  {outer}:"
        yield from texts
    if section == "runtime" and made.modules:
        modules = ", ".join(made.modules)
        yield "  # Remove the # of the next line when you have read the code of your rewards."
        yield f"  # allow_code: [{modules}]"


def _block(title: str, omissions: Iterable[Omission]) -> list[str]:
    lines = [
        f"#   {one.place}: {_one_line(f'{one.key}: {one.value} - {one.why}')}" for one in omissions
    ]
    return ["", f"# {title}", *lines] if lines else []


def _unread(made: Translation) -> list[str]:
    lines = [f"#   {one.place}: {_one_line(f'{one.text} - {one.why}')}" for one in made.unread]
    return (
        ["", "# Could not be read. Set the corresponding keys yourself:", *lines] if lines else []
    )


def flow(value: Any) -> str:
    """Return a value as YAML on one line."""
    if isinstance(value, dict):
        pairs = (f"{_key(name)}: {flow(below)}" for name, below in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(flow, value)) + "]"
    return _safe(spell_value(value, "yaml"))


def _key(name: Any) -> str:
    text = str(name)
    return text if _PLAIN_KEY.fullmatch(text) else spell_value(text, "yaml")


def _safe(text: str) -> str:
    """Return ``text`` with all characters escaped that YAML does not accept inside quotes, such as
    line ends.
    """
    return "".join(one if one.isprintable() else f"\\U{ord(one):08x}" for one in text)


def _one_line(text: str) -> str:
    """Return a text as one line for a comment. Secrets and characters that control a terminal are
    hidden.
    """
    line = " ".join(redact(escape_unprintable(text)).split())
    return line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..."


def _fine(row: Row) -> str:
    """Return, as text, the values that turn off the unsupported feature of a refused key. With such
    a value the key is not refused. The text omits values that mean "off" for every key, such as
    False. If the key of ``row`` is not a refused key, the text is empty.
    """
    usual = Row._field_defaults["off"]
    return ", ".join(str(one) for one in row.off if one not in usual) if row.refused else ""


def markdown(form: str) -> str:
    """Return a Markdown table of the keys of a format. Each line has the key of the other tool, the
    key of the run file, what happens to the key, and why.
    """
    found = table(form)
    lines = [
        f"The keys of {found.title}, and how `toolkit import` converts them.",
        "",
        "| key of the other tool | key of the run file | what happens | why |",
        "| --- | --- | --- | --- |",
    ]
    for row in found.rows:
        to = f"`{row.to}`" if row.to else ""
        why = row.why + (f"; not refused if the value is {fine}" if (fine := _fine(row)) else "")
        lines.append(f"| `{row.old}` | {to} | {row.kind} | {why.replace('|', '/')} |")
    return "\n".join(lines) + "\n"
