"""Read the settings in YAML, JSON and TOML files of other tools."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.config.importers.foreign import ForeignConfig
from toolkit.config.scalars import read_legacy

if TYPE_CHECKING:
    from toolkit.config.document import Document, Node
    from toolkit.config.importers.mapping import Table


def from_document(document: Document, table: Table) -> ForeignConfig:
    """Return the settings in a YAML, JSON or TOML file of another tool. ``document`` is the parsed
    file. YAML tags, merge keys and duplicate keys are not accepted by the parser, and are recorded
    as parts that could not be read.
    """
    foreign = ForeignConfig(table.format_name)
    for finding in document.findings:
        position = finding.position
        location = f"line {position.line}" if position else "the file"
        line = document.source.lines[position.line - 1].strip() if position else ""
        foreign.record_unread(location, line, finding.message)
    _add_settings(foreign, table, "", document.root)
    return foreign


def _add_settings(foreign: ForeignConfig, table: Table, prefix: str, node: Node) -> None:
    for name, child in node.value.items():
        if name.startswith("\0"):
            continue  # a placeholder for an invalid key, which a finding reports
        key = f"{prefix}{name}"
        location = f"line {(child.key_position or child.position).line}"
        is_one_setting = (key in table.by_key and key not in table.key_prefixes) or not child.value
        if isinstance(child.value, dict) and not is_one_setting:
            _add_settings(foreign, table, f"{key}.", child)
        elif isinstance(child.value, list) and not is_one_setting and _has_only_mappings(child):
            _add_settings(foreign, table, f"{key}.", child.value[0])
            for item in child.value[1:]:
                foreign.record_unread(
                    f"line {item.position.line}", key, "only the first item is converted"
                )
        else:
            foreign.add(key, legacy_value(child), location)


def _has_only_mappings(node: Node) -> bool:
    return all(isinstance(item.value, dict) for item in node.value)


def legacy_value(node: Node) -> Any:
    """Return the value of a node as YAML 1.1 reads it, because other tools use YAML 1.1. In YAML
    1.1, yes, no, on and off are booleans.
    """
    if isinstance(node.value, dict):
        return {key: legacy_value(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [legacy_value(child) for child in node.value]
    if node.is_plain and node.yaml11_warning is not None and isinstance(node.value, str):
        legacy = read_legacy(node.value)[1]
        if isinstance(legacy, bool):
            return legacy
    return node.value
