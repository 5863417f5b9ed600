"""Load a complete run file. First, the run file is merged over its base file, which is the file
that its key ``extends`` names. Then the ``--set`` overrides are merged over the result.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.config.document import Document, Node
from toolkit.config.extends import (
    chain_fault,
    content_fault,
    finding_at,
    location_fault,
    resolve_base_path,
)
from toolkit.config.finding import Finding, Severity
from toolkit.config.source import MAX_LAYERS, Position, Source
from toolkit.config.text_reader import UnreadableText, failed_document, read_source
from toolkit.config.yaml_reader import parse_yaml

if TYPE_CHECKING:
    from collections.abc import Sequence


def load_document(path: str | Path, overrides: Sequence[str] = ()) -> Document:
    """Load the run file at ``path`` (``-`` is standard input), with its base files and the
    overrides. Problems in the text become findings of the document, not exceptions.
    """
    try:
        source = read_source(path)
    except UnreadableText as error:
        return failed_document(error.finding)
    return assemble(source, overrides)


def assemble(source: Source, overrides: Sequence[str] = ()) -> Document:
    """Return the document of the run file ``source``, merged over its base files, with the
    overrides applied.
    """
    document = parse_source(source)
    _merge_base(document, [source.path] if source.path else [], source.folder)
    for text in overrides:
        _apply_override(document, text)
    return document


def parse_source(source: Source) -> Document:
    """Parse one text in its format (YAML, JSON or TOML), without its base file."""
    if source.format == "json":
        from toolkit.config.json_reader import parse_json  # noqa: PLC0415 - most run files are YAML

        document = parse_json(source)
    elif source.format == "toml":
        from toolkit.config.toml_reader import parse_toml  # noqa: PLC0415 - most run files are YAML

        document = parse_toml(source)
    else:
        document = parse_yaml(source)
    if not isinstance(document.root.value, dict):
        kind = "empty" if document.root.value is None else "not a mapping of keys"
        if not document.findings:
            document.findings.append(finding_at("DOC001", document.root, f"the run file is {kind}"))
        document.is_complete = False
        document.root = Node({}, document.root.position, source)
    return document


def _merge_base(document: Document, chain: list[Path], root: Path) -> None:
    """Merge ``document`` over its base file. The key ``extends`` of a file contains the path of its
    base file. If a base file has its own base file, those two are merged first. All base files must
    be in or below the folder ``root``, or a folder that TOOLKIT_EXTENDS_FROM lists. ``chain`` lists
    the files that were loaded so far.
    """
    node = document.root.value.pop("extends", None)
    if node is None:
        return
    base = _load_base(node, chain, root)
    if isinstance(base, Finding):
        document.findings.append(base)
        document.is_complete = False
        return
    _merge_base(base, [*chain, Path(node.source.folder, node.value).resolve()], root)
    document.findings += base.findings
    document.is_complete &= base.is_complete
    document.root = merge_nodes(base.root, document.root)


def _load_base(node: Node, chain: list[Path], root: Path) -> Document | Finding:
    """Return the document of a base file. Return a finding if the base file cannot be used.
    ``node`` is the value of ``extends``.
    """
    if not isinstance(node.value, str) or not node.value or "\0" in node.value:
        return finding_at("DOC011", node, "extends: the value must be the path of one run file")
    path = resolve_base_path(node)
    if path is None:
        return finding_at(
            "DOC011",
            node,
            f"extends: {node.value} cannot be opened: the symbolic links of its path form a loop",
        )
    if cycle := chain_fault(path, chain, MAX_LAYERS):
        return finding_at("DOC011", node, f"extends forms a loop: {cycle}")
    if fault := location_fault(path, node, root):
        return fault
    try:
        base = parse_source(read_source(_display_path(path, node), real_path=path))
    except UnreadableText as error:
        return finding_at("DOC011", node, f"extends: {node.value} {error.finding.message}")
    return content_fault(base, node) or base


def _display_path(path: Path, node: Node) -> Path:
    """Return the path of a base file as messages show it. ``node`` is the value of ``extends``.

    The path begins with the folder of the file that contains ``extends``, as the user wrote this
    folder (relative or absolute). If ``extends`` is not in a file, the result is ``path``.
    """
    return Path(node.source.name).parent / node.value if node.source.path else path


def merge_nodes(base: Node, override: Node) -> Node:
    """Return ``override`` merged over ``base``. Two mappings are merged key by key. Any other value
    of ``override`` replaces the value of ``base``. Nodes keep their positions.
    """
    if not (isinstance(base.value, dict) and isinstance(override.value, dict)):
        return override
    merged = Node(dict(base.value), override.position, override.source)
    merged.key_position = override.key_position
    for key, child in override.value.items():
        merged.value[key] = merge_nodes(base.value[key], child) if key in base.value else child
    return merged


def _apply_override(document: Document, text: str) -> None:
    """Apply one ``--set`` override, which has the form ``key.path=value``."""
    name, equals, value_text = text.partition("=")
    source = Source(f"--set {text}", value_text, Path.cwd(), None, "set")
    argument = Node(None, Position(1, 1, 0, len(value_text)), source)
    keys = name.strip().split(".")
    if not equals or not all(keys):
        document.findings.append(
            finding_at(
                "DOC012",
                argument,
                "an override must have the form key=value, for example grpo.max_steps=10",
            )
        )
        return
    try:
        text.encode()
    except UnicodeEncodeError:  # the shell passed bytes that are no UTF-8
        document.findings.append(finding_at("DOC012", argument, "an override must be UTF-8 text"))
        return
    parsed = parse_yaml(source)
    if any(finding.severity is Severity.ERROR for finding in parsed.findings):
        document.findings += parsed.findings
        return
    value = parsed.root if value_text.strip() else Node(None, argument.position, source)
    value.key_position = argument.position
    problem = _set_key(document.root, keys, value)
    if problem:
        document.findings.append(finding_at("DOC012", argument, problem))


def _set_key(root: Node, keys: list[str], value: Node) -> str | None:
    """Set the key at the path ``keys`` to ``value``. Missing mappings on the path are created.
    Return an error text if a value on the path cannot contain the next key: it is a scalar, or a
    list without that item.
    """
    node = root
    for depth, key in enumerate(keys):
        container: Any = node.value
        is_last = depth == len(keys) - 1
        if isinstance(container, list):
            if not key.isdigit() or int(key) >= len(container):
                return (
                    f"{'.'.join(keys[: depth + 1])}: the list has items 0 to {len(container) - 1}"
                )
            index: Any = int(key)
        elif isinstance(container, dict):
            index = key
            if not is_last and key not in container:
                container[key] = Node({}, value.position, value.source)
                container[key].key_position = value.position
        else:
            return f"{'.'.join(keys[:depth])} is not a mapping, so it has no key {key}"
        if is_last:
            container[index] = value
        else:
            node = container[index]
    return None
