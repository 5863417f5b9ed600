"""Write a translation as the text of a run file. A comment on each line names the setting from
which the line was made. This module also writes the table of a format for the documentation.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.base.formatting import escape_unprintable
from toolkit.base.secrets import redact
from toolkit.config.importers.formats import load_table
from toolkit.config.importers.mapping import Row, RunValue
from toolkit.config.message_text import spell_value

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from toolkit.config.importers.mapping import Omission, Translation

SECTIONS = ("model", "lora", "dataset", "reward", "grpo", "runtime")
_MAX_COMMENT_LENGTH = 240
_PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def run_file_text(translation: Translation, name: str) -> str:
    """Return the text of the run file in YAML. ``name`` is the name of the other tool's file."""
    if "runtime.output_dir" not in translation.run_values:
        stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(name).stem).strip("-") or "run"
        translation.run_values["runtime.output_dir"] = RunValue(
            f"runs/{stem}", "the original names no output folder"
        )
    lines = [f"# Made from {_one_line(name)} ({translation.table.title}) by toolkit import."]
    lines += [f"# {_one_line(note)}" for note in translation.notes]
    for section in SECTIONS:
        body = list(_section_lines(translation, section))
        if body:
            lines += ["", f"{section}:", *body]
    lines += _omission_lines(
        "Not supported here, so the run differs from the original:", translation.refused
    )
    lines += _unread_lines(translation)
    lines += _omission_lines(
        "Left out, because a run does not need these settings:", translation.left_out
    )
    return "\n".join(lines) + "\n"


def _section_lines(translation: Translation, section: str) -> Iterator[str]:
    if section == "reward" and translation.rewards:
        yield "  functions:"
        for reward, note in zip(translation.rewards, translation.reward_notes, strict=True):
            yield f"    - {flow_yaml(reward)}  # {_one_line(note)}"
    nested: dict[str, list[str]] = {}
    for key, run_value in translation.run_values.items():
        key_section, _, rest = key.partition(".")
        if key_section != section:
            continue
        outer, _, inner = rest.partition(".")
        if inner:
            text = f"    {inner}: {flow_yaml(run_value.value)}  # {_one_line(run_value.why)}"
            nested.setdefault(outer, []).append(text)
        else:
            yield f"  {rest}: {flow_yaml(run_value.value)}  # {_one_line(run_value.why)}"
    for outer, texts in nested.items():
        yield f"  {outer}:"
        yield from texts
    if section == "runtime" and translation.reward_modules:
        modules = ", ".join(translation.reward_modules)
        yield "  # Remove the # of the next line when you have read the code of your rewards."
        yield f"  # allow_code: [{modules}]"


def _omission_lines(title: str, omissions: Iterable[Omission]) -> list[str]:
    lines = [
        f"#   {one.location}: {_one_line(f'{one.key}: {one.value} - {one.why}')}"
        for one in omissions
    ]
    return ["", f"# {title}", *lines] if lines else []


def _unread_lines(translation: Translation) -> list[str]:
    lines = [
        f"#   {one.location}: {_one_line(f'{one.text} - {one.why}')}" for one in translation.unread
    ]
    return (
        ["", "# Could not be read. Set the corresponding keys yourself:", *lines] if lines else []
    )


def flow_yaml(value: object) -> str:
    """Return a value as YAML on one line."""
    if isinstance(value, dict):
        pairs = (f"{_key(name)}: {flow_yaml(below)}" for name, below in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(flow_yaml, value)) + "]"
    return _escape_unprintable(spell_value(value, "yaml"))


def _key(name: Any) -> str:
    text = str(name)
    return text if _PLAIN_KEY.fullmatch(text) else spell_value(text, "yaml")


def _escape_unprintable(text: str) -> str:
    """Return ``text`` with all characters escaped that YAML does not accept inside quotes, such as
    line ends.
    """
    return "".join(one if one.isprintable() else f"\\U{ord(one):08x}" for one in text)


def _one_line(text: str) -> str:
    """Return a text as one line for a comment. Secrets and characters that control a terminal are
    hidden.
    """
    line = " ".join(redact(escape_unprintable(text)).split())
    return line if len(line) <= _MAX_COMMENT_LENGTH else line[: _MAX_COMMENT_LENGTH - 3] + "..."


def _accepted_values(row: Row) -> str:
    """Return, as text, the values that a refused key may have, because they turn the unsupported
    feature off. The text omits values that mean "off" for every key, such as False. If the key of
    ``row`` is not a refused key, the text is empty.
    """
    usual = Row._field_defaults["off"]
    return ", ".join(str(one) for one in row.off if one not in usual) if row.refused else ""


def table_markdown(format_name: str) -> str:
    """Return a Markdown table of the keys of a format. Each line has the key of the other tool, the
    key of the run file, what happens to the key, and why.
    """
    loaded = load_table(format_name)
    lines = [
        f"The keys of {loaded.title}, and how `toolkit import` converts them.",
        "",
        "| key of the other tool | key of the run file | what happens | why |",
        "| --- | --- | --- | --- |",
    ]
    for row in loaded.rows:
        to = f"`{row.run_key}`" if row.run_key else ""
        why = row.why + (
            f"; not refused if the value is {fine}" if (fine := _accepted_values(row)) else ""
        )
        lines.append(f"| `{row.foreign_key}` | {to} | {row.kind} | {why.replace('|', '/')} |")
    return "\n".join(lines) + "\n"
