"""Check the structure of a document with a JSON Schema. Unknown keys, wrong types, invalid values
and values out of range are reported with their positions.

This module implements only the part of JSON Schema that run.schema.json uses. One test checks that
run.schema.json uses nothing else. Another test compares this module with the library jsonschema on
generated values. There is one intended difference: this module does not accept 8.0 as an integer.

The library jsonschema is not used here for two reasons. Its message "is not valid under any of the
given schemas" does not help a user. Its import takes 60 ms to one second, depending on what else is
installed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from toolkit.config.finding import Edit, Finding, Fix, Severity
from toolkit.config.message_text import show_value, spell_value
from toolkit.config.scalars import beyond_64_bits
from toolkit.config.schema_violation import SchemaViolation, fits_type, value_fault
from toolkit.config.source import MAX_SUGGESTIONS, KeyPath, dotted

if TYPE_CHECKING:
    from toolkit.config.document import Node


class StructureCheck(NamedTuple):
    """The result of a structure check: the findings, and the paths of the invalid values
    (``invalid_paths``). No rule may use an invalid value.
    """

    findings: list[Finding]
    invalid_paths: set[KeyPath]


class KeyAdvice(Protocol):
    """The type of a function that returns notes and fixes for an unknown key, such as
    ``config.suggest.key_advice``.
    """

    def __call__(
        self, path: KeyPath, node: Node, properties: dict[str, Any], root: Node
    ) -> tuple[tuple[str, ...], tuple[Fix, ...]]: ...


def check_structure(
    root: Node, schema: dict[str, Any], advise: KeyAdvice | None = None
) -> StructureCheck:
    """Check ``root`` and all nodes below it with ``schema``. ``advise`` is a function that returns
    notes and fixes for an unknown key.
    """
    checker = _StructureChecker(root, advise)
    checker.check_node(root, schema, ())
    return StructureCheck(checker.findings, checker.invalid_paths)


class _StructureChecker:
    def __init__(self, root: Node, advise: KeyAdvice | None) -> None:
        self.root = root
        self.advise = advise
        self.findings: list[Finding] = []
        self.invalid_paths: set[KeyPath] = set()
        self.unknown_key_count = 0

    def check_node(self, node: Node, schema: dict[str, Any], path: KeyPath) -> None:
        if "x-refused" in schema:
            return  # rule KEY007 reports it
        branches = schema.get("anyOf")
        if branches is not None:
            schema = _matching_branch(node.value, branches) | {
                k: v for k, v in schema.items() if k != "anyOf"
            }
        if isinstance(node.value, float) and not math.isfinite(node.value):
            self.invalid_paths.add(path)  # reported while loading (DOC006)
            return
        if beyond_64_bits(node.value):
            self.invalid_paths.add(path)  # reported while loading (DOC015)
            return
        fault = value_fault(node.value, schema)
        if fault is not None:
            self.invalid_paths.add(path)
            if "x-rule" not in schema or fault.rule == "KEY003":
                self.report(node, schema, path, fault)
        elif isinstance(node.value, dict):
            self.check_mapping(node, schema, path)
        elif isinstance(node.value, list):
            self.check_list(node, schema, path)
        elif node.yaml11_warning is not None:
            self.findings.append(node.yaml11_warning)

    def check_mapping(self, node: Node, schema: dict[str, Any], path: KeyPath) -> None:
        properties = schema.get("properties", {})
        for key, child in node.value.items():
            key_schema = properties.get(key)
            if key_schema is not None:
                self.check_node(child, key_schema, (*path, key))
            elif schema.get("additionalProperties") is False and not key.startswith("\0"):
                self.invalid_paths.add((*path, key))
                self.unknown_key_count += 1
                suggestible = properties if self.unknown_key_count <= MAX_SUGGESTIONS else {}
                self.findings.append(self.unknown_key_finding(child, (*path, key), suggestible))
            elif isinstance(schema.get("additionalProperties"), dict):
                self.check_node(child, schema["additionalProperties"], (*path, key))
            else:
                self.check_unrestricted(child, (*path, key))
        for key in schema.get("required", ()):
            if key not in node.value:
                self.invalid_paths.add((*path, key))
                self.findings.append(_missing_key_finding(node, (*path, key), properties[key]))

    def unknown_key_finding(self, node: Node, path: KeyPath, properties: dict[str, Any]) -> Finding:
        """Return the finding KEY001, with suggestions for the key that the user probably meant."""
        notes: tuple[str, ...] = ()
        fixes: tuple[Fix, ...] = ()
        if properties and self.advise is not None:
            notes, fixes = self.advise(path, node, properties, self.root)
        return Finding(
            rule="KEY001",
            severity=Severity.ERROR,
            message=f"{dotted(path)}: unknown key",
            path=path,
            source=node.source,
            position=node.key_position,
            notes=notes,
            fixes=fixes,
        )

    def check_list(self, node: Node, schema: dict[str, Any], path: KeyPath) -> None:
        items = schema.get("items", {})
        for index, child in enumerate(node.value):
            self.check_node(child, items, (*path, index))

    def check_unrestricted(self, node: Node, path: KeyPath) -> None:
        """Check a value for which the schema has no restrictions. Only one problem is reported: a
        scalar that YAML 1.1 and YAML 1.2 read differently.
        """
        for _, descendant in node.walk(path):
            if descendant.yaml11_warning is not None:
                self.findings.append(descendant.yaml11_warning)

    def report(
        self, node: Node, schema: dict[str, Any], path: KeyPath, fault: SchemaViolation
    ) -> None:
        notes, fixes = fault.notes, fault.fixes
        if node.yaml11_warning is not None:
            notes = (*notes, node.yaml11_warning.message)
        edits = [
            Fix(spelling, (Edit(node.source, node.position.start, node.position.end, spelling),))
            for spelling in (spell_value(value, node.source.format) for value in fixes)
        ]
        self.findings.append(
            Finding(
                rule=fault.rule,
                severity=Severity.ERROR,
                message=f"{dotted(path)}: {fault.message}",
                path=path,
                source=node.source,
                position=node.position,
                notes=notes,
                fixes=tuple(edits) or _default_fix(schema, fault),
            )
        )


def _default_fix(schema: dict[str, Any], fault: SchemaViolation) -> tuple[Fix, ...]:
    if fault.rule == "KEY006" and "default" in schema:
        return (Fix(f"remove the key to use the default, {show_value(schema['default'])}"),)
    return ()


def _matching_branch(value: object, branches: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the branch of an ``anyOf`` with which ``value`` is checked. This is the first branch
    that accepts the value, else the first branch that allows the type of the value, whose key
    ``x-others`` lists the other branches. If no branch allows its type, return a schema whose key
    ``x-either`` lists all branches.
    """
    for branch in branches:
        if value_fault(value, branch) is None:
            return branch
    for branch in branches:
        if fits_type(value, branch):
            return {**branch, "x-others": [other for other in branches if other is not branch]}
    return {"x-either": branches}


def _missing_key_finding(node: Node, path: KeyPath, schema: dict[str, Any]) -> Finding:
    example = schema.get("examples", ["..."])[0]
    return Finding(
        rule="KEY002",
        severity=Severity.ERROR,
        message=f"{dotted(path)} is missing",
        path=path,
        source=node.source,
        position=node.key_position or node.position,
        fixes=(
            Fix(
                f"{path[-1]}: {spell_value(example, 'yaml')}"
                if not isinstance(example, dict)
                else f"add {path[-1]}:"
            ),
        ),
    )
