"""Read the settings in YAML, JSON and TOML files of other tools."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.config.importers.foreign import Foreign
from toolkit.config.scalars import read_legacy

if TYPE_CHECKING:
    from toolkit.config.document import Document, Node
    from toolkit.config.importers.mapping import Table


def from_document(document: Document, table: Table) -> Foreign:
    """Return the settings in a YAML, JSON or TOML file of another tool. ``document`` is the parsed
    file. YAML tags, merge keys and duplicate keys are not accepted by the parser, and are recorded
    as parts that could not be read.
    """
    foreign = Foreign(table.form)
    for found in document.findings:
        mark = found.position
        place = f"line {mark.line}" if mark else "the file"
        line = document.source.lines[mark.line - 1].strip() if mark else ""
        foreign.miss(place, line, found.message)
    _flatten(foreign, table, "", document.root)
    return foreign


def _flatten(foreign: Foreign, table: Table, prefix: str, node: Node) -> None:
    for name, child in node.value.items():
        if name.startswith("\0"):
            continue  # a placeholder for an invalid key, which a finding reports
        key = f"{prefix}{name}"
        place = f"line {(child.key_position or child.position).line}"
        whole = (key in table.by_key and key not in table.groups) or not child.value
        if isinstance(child.value, dict) and not whole:
            _flatten(foreign, table, f"{key}.", child)
        elif isinstance(child.value, list) and not whole and _of_mappings(child):
            _flatten(foreign, table, f"{key}.", child.value[0])
            for other in child.value[1:]:
                foreign.miss(f"line {other.position.line}", key, "only the first item is converted")
        else:
            foreign.add(key, plain(child), place)


def _of_mappings(node: Node) -> bool:
    return all(isinstance(item.value, dict) for item in node.value)


def plain(node: Node) -> Any:
    """Return the value of a node as YAML 1.1 reads it, because other tools use YAML 1.1. In YAML
    1.1, yes, no, on and off are booleans.
    """
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [plain(child) for child in node.value]
    if node.is_plain and node.yaml11_warning is not None and isinstance(node.value, str):
        legacy = read_legacy(node.value)[1]
        if isinstance(legacy, bool):
            return legacy
    return node.value
