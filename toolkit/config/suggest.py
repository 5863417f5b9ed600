"""Suggest what an unknown key was meant to be: the nearest legal word, or the section that a
misplaced key belongs to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.base.did_you_mean import near
from toolkit.config.finding import Fix, rename
from toolkit.config.key_moves import at, is_valid, move, schema_of
from toolkit.config.migration import FORCED, MOVED, converted
from toolkit.config.schemas import find_schema
from toolkit.config.source import dotted

if TYPE_CHECKING:
    from toolkit.config.document import Node
    from toolkit.config.source import KeyPath


def key_advice(
    path: KeyPath, node: Node, properties: dict[str, Any], root: Node
) -> tuple[tuple[str, ...], tuple[Fix, ...]]:
    """Notes and fixes for an unknown key. A fix has an edit only if the value is valid for the new
    key and the run file does not set that key yet.
    """
    key, parent = str(path[-1]), path[:-1]
    other = _elsewhere(path, node, root)
    if other is not None:
        return (), other
    siblings = {
        name: below for name, below in properties.items() if _may_be_advised(parent, name, below)
    }
    close = near(key, list(siblings))
    if close:
        return (), tuple(_did_you_mean(name, path, node, siblings[name], root) for name in close)
    if len(siblings) <= 12:
        named = [name for name in siblings if name.isidentifier()]
        return ("known here: " + ", ".join(named),), ()
    return (), (Fix(f"`envcheck explain {dotted(parent)}` lists the keys"),)


def _may_be_advised(parent: KeyPath, name: str, schema: dict[str, Any]) -> bool:
    return "x-refused" not in schema and dotted((*parent, name)) not in FORCED


def _did_you_mean(name: str, path: KeyPath, node: Node, schema: dict[str, Any], root: Node) -> Fix:
    text = f"did you mean {name}?"
    if at(root, (*path[:-1], name)) is not None:
        return Fix(f"{text} It is already written")
    if node.key is None or node.source.is_override or not is_valid(node, schema):
        return Fix(text)
    return Fix(text, (rename(node.source, node.key, name),))


def _elsewhere(path: KeyPath, node: Node, root: Node) -> tuple[Fix, ...] | None:
    """The fixes for a key that belongs to another section, under this name or its current name;
    None if no section has it.
    """
    key, parent = str(path[-1]), path[:-1]
    names = [
        dotted((section, key))
        for section, below in find_schema("run")["properties"].items()
        if (section,) != parent and key in below.get("properties", {})
    ]
    names += [
        old for old in MOVED if old.endswith(f".{key}") and old.count(".") == 1 and old not in names
    ]
    places: dict[str, Any] = {}
    for old in names:
        if schema_of(tuple(old.split("."))) is not None:
            places[old] = node.value
            continue
        today = converted(old, node.value)
        if today is not None and today[0] is not None:
            places[today[0]] = today[1]
    if not places:
        return None
    if len(places) > 1 or any(isinstance(part, int) for part in path):
        return (Fix(f"it belongs in another section: {' or '.join(places)}"),)
    ((to, value),) = places.items()
    fix = move(root, path, to, value)
    return (Fix(f"it belongs in another section: {to}", fix.edits, fix.moved),)
