"""Make the fixes that move a key of a run file to another section, or that remove a key, in YAML,
JSON and TOML.

Such a fix contains edits only if the key's value is a scalar on one line, and if this module
supports the layout of the text around the key. Otherwise the fix has no edits, and its text tells
the user what to do.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from toolkit.config.finding import Edit, Fix, rename_key
from toolkit.config.message_text import spell_value
from toolkit.config.schemas import find_schema
from toolkit.config.source import dotted
from toolkit.config.structure import check_structure

if TYPE_CHECKING:
    from toolkit.config.document import Node
    from toolkit.config.source import KeyPath, Source

_COMMENT = re.compile(r"[ \t]*(#.*)?")


def key_schema(path: KeyPath) -> dict[str, Any] | None:
    """Return the schema of the key at ``path``; None if the key is unknown or refused."""
    schema: dict[str, Any] | None = find_schema("run")
    for part in path:
        schema = None if schema is None else schema.get("properties", {}).get(part)
    return None if schema is None or "x-refused" in schema else schema


def is_valid(node: Node, schema: dict[str, Any]) -> bool:
    """Whether ``schema``, the schema of a key, accepts the value of ``node``."""
    check = check_structure(node, schema)
    return not check.invalid_paths and all(finding.rule == "DOC007" for finding in check.findings)


def find_node(root: Node, path: KeyPath) -> Node | None:
    """Return the node at ``path`` in a tree of mappings; None if there is no such node."""
    node: Node | None = root
    for part in path:
        node = node.value.get(part) if node is not None and isinstance(node.value, dict) else None
    return node


def removal_fix(root: Node, old_path: KeyPath) -> Fix:
    """Return the fix that removes the key at the path ``old_path``."""
    node = find_node(root, old_path)
    edit = None if node is None else _removal_edit(root, old_path, node)
    if node is None or edit is None:
        return Fix("remove the key")
    return Fix("remove the key", (edit,), _printed_change(node, old_path, "(removed)"))


def move_fix(root: Node, old_path: KeyPath, new_key: str, value: object) -> Fix:
    """Return the fix that replaces the key at the path ``old_path`` by the dotted key ``new_key``
    with ``value``.

    If the run file already sets ``new_key`` to the same value, the fix only removes the old key.
    The fix has no edits if ``new_key`` has another value, or if ``value`` is not valid for
    ``new_key``.
    """
    node, new_path = find_node(root, old_path), tuple(new_key.split("."))
    spelling = spell_value(value, "yaml")
    text = f"use {new_key}: {spelling}"
    schema, existing = key_schema(new_path), find_node(root, new_path)
    if node is None or schema is None or isinstance(value, (dict, list)):
        return Fix(f"use {new_key}")
    probe = type(node)(value, node.position, node.source)
    if not is_valid(probe, schema):
        return Fix(f"use {new_key}")
    if existing is not None:
        has_same_value = type(existing.value) is type(value) and existing.value == value
        edit = _removal_edit(root, old_path, node) if has_same_value else None
        if edit is None:
            text = (
                "remove the key"
                if has_same_value
                else f"remove the key, because {new_key} is already set"
            )
            return Fix(text)
        return Fix(
            "remove the key",
            (edit,),
            _printed_change(node, old_path, f"(removed: {new_key} has this value)"),
        )
    if old_path[:-1] == new_path[:-1]:
        edits = _rename_edits(node, new_path, value)
    else:
        removal = _removal_edit(root, old_path, node)
        edits = _insertion_edits(root, node, new_path, value)
        edits = (removal, *edits) if removal is not None and edits else ()
    return Fix(
        text, edits, _printed_change(node, old_path, f"{new_key}: {spelling}") if edits else None
    )


def _printed_change(node: Node, old_path: KeyPath, new_text: str) -> tuple[str, str]:
    value_text = node.source.text[node.position.start : node.position.end]
    return f"{dotted(old_path)}: {value_text}", new_text


def _rename_edits(node: Node, new_path: KeyPath, value: object) -> tuple[Edit, ...]:
    """Return the edits that rename the key of ``node`` to the last part of ``new_path``, and that
    change its value to ``value``. Return no edits if the key comes from a ``--set`` override.
    """
    if node.key_position is None or node.source.is_override:
        return ()
    edits = [rename_key(node.source, node.key_position, str(new_path[-1]))]
    if type(value) is not type(node.value) or value != node.value:
        spelling = spell_value(value, node.source.format)
        edits.append(Edit(node.source, node.position.start, node.position.end, spelling))
    return tuple(edits)


def _removal_edit(root: Node, path: KeyPath, node: Node) -> Edit | None:
    """Return the edit that removes a key and its scalar value; None if this is not possible."""
    source, key, parent = node.source, node.key_position, find_node(root, path[:-1])
    one_line = key is not None and key.line == node.position.line and "\n" not in _value_text(node)
    if source.is_override or key is None or parent is None or not one_line:
        return None
    if isinstance(node.value, (dict, list)) or len(_entries_from(parent, source)) < 2:
        return None  # removing the key would leave an empty section
    if _is_flow(parent):
        return _flow_removal_edit(node)
    start, end, before, after = _surrounding_line(source.text, key.start, node.position.end)
    if before.strip() or not _COMMENT.fullmatch(after.rstrip("\r")):
        return None
    return Edit(source, start, end, "")


def _flow_removal_edit(node: Node) -> Edit | None:
    """Return the edit that removes a key and an adjacent comma from a mapping such as {a: 1,
    b: 2}.
    """
    assert node.key_position is not None
    text, start, end = node.source.text, node.key_position.start, node.position.end
    comma_after = re.compile(r"\s*,[ \t]*(\r?\n[ \t]*)?").match(text, end)
    if comma_after is not None:
        return Edit(node.source, start, comma_after.end(), "")
    comma_before = re.search(r",\s*$", text[:start])
    if comma_before is not None:
        return Edit(node.source, comma_before.start(), end, "")
    return None


def _insertion_edits(root: Node, node: Node, new_path: KeyPath, value: object) -> tuple[Edit, ...]:
    """Return the edits that insert the key ``new_path`` into its section, and that create the
    section if it does not exist. Return no edits if this is not possible.
    """
    source = node.source
    section, name = find_node(root, new_path[:-1]), str(new_path[-1])
    if source.is_override or len(new_path) != 2:
        return ()
    key = f'"{name}"' if source.format == "json" else name
    separator = " = " if source.format == "toml" else ": "
    pair = f"{key}{separator}{spell_value(value, source.format)}"
    line = pair + _line_comment(node)
    entries = [] if section is None else _entries_from(section, source)
    if section is not None and entries:
        if _is_flow(section):
            return (
                Edit(source, section.position.start + 1, section.position.start + 1, f"{pair}, "),
            )
        first = entries[0].key_position
        assert first is not None
        start, _, before, _ = _surrounding_line(source.text, first.start, first.end)
        newline = _newline(source)
        if before.strip():
            return ()
        return (Edit(source, start, start, f"{before}{line}{newline}"),)
    if section is not None and section.source is source:
        return ()  # the section is empty or not a mapping
    return _new_section_edits(root, source, str(new_path[0]), pair, line)


def _new_section_edits(
    root: Node, source: Source, section: str, pair: str, line: str
) -> tuple[Edit, ...]:
    text, newline = source.text, _newline(source)
    entries = _entries_from(root, source)
    if not entries:
        return ()
    first = entries[0].key_position
    assert first is not None
    if source.format == "json" or text[: first.start].rstrip().endswith("{"):
        brace = text.rfind("{", 0, first.start)
        name = f'"{section}"' if source.format == "json" else section
        return (Edit(source, brace + 1, brace + 1, f"{name}: {{{pair}}}, "),) if brace >= 0 else ()
    if source.format == "yaml" and (first.column != 1 or re.search(r"^(---|\.\.\.)", text, re.M)):
        return ()
    header = f"[{section}]" if source.format == "toml" else f"{section}:"
    indent = "" if source.format == "toml" else "  "
    gap = "" if text.endswith("\n") else newline
    end = len(text)
    return (Edit(source, end, end, f"{gap}{header}{newline}{indent}{line}{newline}"),)


def _line_comment(node: Node) -> str:
    """Return the comment at the end of the line of ``node``. The comment moves together with the
    key. Return an empty text if there is no comment, or if other text precedes the key on its line.
    """
    if node.key_position is None:
        return ""
    _, _, before, after = _surrounding_line(
        node.source.text, node.key_position.start, node.position.end
    )
    after = after.rstrip("\r")
    return after if not before.strip() and _COMMENT.fullmatch(after) else ""


def _entries_from(mapping: Node, source: Source) -> list[Node]:
    """Return the entries of a mapping that come from the text ``source``, in the order of the text.
    The other entries come from base files and ``--set`` overrides.
    """
    if not isinstance(mapping.value, dict):
        return []
    entries = [
        entry for entry in mapping.value.values() if entry.source is source and entry.key_position
    ]
    return sorted(entries, key=lambda entry: entry.key_position.start if entry.key_position else 0)


def _is_flow(mapping: Node) -> bool:
    start = mapping.position.start
    return mapping.source.format != "toml" and mapping.source.text[start : start + 1] == "{"


def _value_text(node: Node) -> str:
    return node.source.text[node.position.start : node.position.end]


def _newline(source: Source) -> str:
    return "\r\n" if "\r\n" in source.text else "\n"


def _surrounding_line(text: str, start: int, end: int) -> tuple[int, int, str, str]:
    """Return four values that describe the line with the characters from ``start`` to ``end``: the
    offset at which the line begins, the offset at which the next line begins, the part of the line
    before ``start``, and the part after ``end``.
    """
    begin = text.rfind("\n", 0, start) + 1
    stop = text.find("\n", end)
    stop = len(text) if stop < 0 else stop
    return begin, min(stop + 1, len(text)), text[begin:start], text[end:stop]
