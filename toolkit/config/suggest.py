"""Suggest what the user meant by an unknown key: the most similar valid key, or the section to
which a misplaced key belongs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.base.did_you_mean import similar_words
from toolkit.config.common_names import COMMON_NAMES, OTHER_UNIT
from toolkit.config.finding import Fix, rename_key
from toolkit.config.key_moves import find_node, is_valid, key_schema, move_fix
from toolkit.config.migration import FORCED_KEYS, MOVED_KEYS, convert_key
from toolkit.config.schemas import find_schema
from toolkit.config.source import dotted

if TYPE_CHECKING:
    from toolkit.config.document import Node
    from toolkit.config.source import KeyPath


def key_advice(
    path: KeyPath, node: Node, properties: dict[str, Any], root: Node
) -> tuple[tuple[str, ...], tuple[Fix, ...]]:
    """Return the notes and the fixes for the unknown key at ``path``. A fix renames or moves the
    key only if the value is valid for the new key and the run file does not set the new key yet.
    Other fixes are only texts. ``properties`` contains the valid keys of the same section.
    """
    key, parent = str(path[-1]), path[:-1]
    common = COMMON_NAMES.get(dotted(path))
    if common is not None:
        name = common.rpartition(".")[2]
        if dotted(path) in OTHER_UNIT:
            return (), (Fix(f"did you mean {name}?"),)
        return (), (_did_you_mean(name, path, node, properties[name], root),)
    other_section = _other_section_fixes(path, node, root)
    if other_section is not None:
        return (), other_section
    siblings = {
        name: below for name, below in properties.items() if _may_be_advised(parent, name, below)
    }
    similar = similar_words(key, list(siblings))
    if similar:
        return (), tuple(_did_you_mean(name, path, node, siblings[name], root) for name in similar)
    if len(siblings) <= 12:
        plain_names = [name for name in siblings if name.isidentifier()]
        return ("valid keys here: " + ", ".join(plain_names),), ()
    return (), (Fix(f"list the valid keys with `envcheck explain {dotted(parent)}`"),)


def _may_be_advised(parent: KeyPath, name: str, schema: dict[str, Any]) -> bool:
    return "x-refused" not in schema and dotted((*parent, name)) not in FORCED_KEYS


def _did_you_mean(name: str, path: KeyPath, node: Node, schema: dict[str, Any], root: Node) -> Fix:
    text = f"did you mean {name}?"
    if find_node(root, (*path[:-1], name)) is not None:
        return Fix(f"{text} The run file already sets {name}")
    if node.key_position is None or node.source.is_override or not is_valid(node, schema):
        return Fix(text)
    return Fix(text, (rename_key(node.source, node.key_position, name),))


def _other_section_fixes(path: KeyPath, node: Node, root: Node) -> tuple[Fix, ...] | None:
    """Return the fixes for a key that is in the wrong section of the run file. They name the
    section that has a key with this name, or with the newer name of this key. Return None if no
    other section has such a key.
    """
    key, parent = str(path[-1]), path[:-1]
    names = [
        dotted((section, key))
        for section, section_schema in find_schema("run")["properties"].items()
        if (section,) != parent and key in section_schema.get("properties", {})
    ]
    names += [
        old
        for old in MOVED_KEYS
        if old.endswith(f".{key}") and old.count(".") == 1 and old not in names
    ]
    candidates: dict[str, Any] = {}
    for old in names:
        if key_schema(tuple(old.split("."))) is not None:
            candidates[old] = node.value
            continue
        conversion = convert_key(old, node.value)
        if conversion is not None and conversion[0] is not None:
            candidates[conversion[0]] = conversion[1]
    if not candidates:
        return None
    if len(candidates) > 1 or any(isinstance(part, int) for part in path):
        return (Fix(f"move the key to the section to which it belongs: {' or '.join(candidates)}"),)
    ((new_key, value),) = candidates.items()
    fix = move_fix(root, path, new_key, value)
    return (
        Fix(
            f"move the key to the section to which it belongs: {new_key}",
            fix.edits,
            fix.printed_change,
        ),
    )
