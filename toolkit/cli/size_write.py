"""``envcheck size --write``: replace each "auto" in the run file by the chosen value. The rest of
the file stays unchanged.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from toolkit.base.errors import ConfigError
from toolkit.base.paths import rewrite_file
from toolkit.cli.exits import writing
from toolkit.config.engine_settings import SIZED
from toolkit.config.layers import parse

if TYPE_CHECKING:
    from toolkit.config.document import Document, Node
    from toolkit.config.run_config import RunConfig

PLAIN = ("auto", '"auto"', "'auto'")
WRITABLE = {
    "model": (*SIZED, "fast_inference", "dtype"),
    "lora": ("use_gradient_checkpointing", "target_modules"),
    "grpo": ("per_device_train_batch_size", "gradient_accumulation_steps"),
}


def write_choice(document: Document, resolved: RunConfig) -> str:
    """Rewrite the run file, and return a text that lists the value that was written for each key.

    Only the characters of each "auto" are replaced. Comments, order, line ends and the quoting of
    other values are kept.

    Raises ConfigError if the document is standard input, or if other values would change too.
    """
    source = document.source
    if source.path is None:
        raise ConfigError("standard input cannot be rewritten", fix="give the path of the run file")
    edits: list[tuple[int, int, str, str]] = []
    left: list[str] = []
    expected = parse(source).root.to_plain()
    for section, names in WRITABLE.items():
        for name in names:
            node = document.node((section, name))
            if node is None or node.value != "auto":
                continue
            part = getattr(resolved, section)
            value = part[name] if section == "grpo" else getattr(part, name)
            if value == "auto":
                continue
            start, end, spelled = node.mark.start, node.mark.end, _spelled(value, node)
            if node.source is not source:
                left.append(f'{section}.{name}: {spelled} (this "auto" is in {node.source.name})')
            elif source.text[start:end] not in PLAIN:
                left.append(
                    f'{section}.{name}: {spelled} (this "auto" is a YAML alias, anchor or block)'
                )
            else:
                edits.append((start, end, spelled, name))
                expected[section][name] = list(value) if isinstance(value, tuple) else value
    text = source.text
    for start, end, spelled, _ in sorted(edits, reverse=True):
        text = text[:start] + spelled + text[end:]
    if parse(replace(source, text=text)).root.to_plain() != expected:
        raise ConfigError(
            "the chosen values cannot be written without changing other values of the file",
            where=source.name,
            fix="replace the YAML aliases in the run file by their values, so that each key has "
            "its own value",
        )
    if edits:
        with writing(source.path):
            rewrite_file(source.path, source.bom + text)
    lines = [f"{source.name}: {name}: {spelled}" for _, _, spelled, name in sorted(edits)]
    lines += [f"not written: {line}" for line in left]
    return "\n".join(lines) or f'{source.name}: contains no "auto"'


def _spelled(value: Any, node: Node) -> str:
    """Return the value as text in the format of the run file (YAML, TOML or JSON)."""
    if isinstance(value, str) and node.source.format == "yaml":
        return value
    return json.dumps(value)
