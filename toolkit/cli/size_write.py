"""``envcheck size --write``: replace each "auto" in the run file by the chosen value. The rest of
the file stays unchanged.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

from toolkit.base.errors import ConfigError
from toolkit.base.paths import rewrite_file
from toolkit.cli.exit_codes import report_write_errors
from toolkit.config.document_loader import parse_source
from toolkit.config.engine_settings import SIZED_OPTIONS

if TYPE_CHECKING:
    from toolkit.config.document import Document, Node
    from toolkit.config.run_config import RunConfig

PLAIN_AUTO = ("auto", '"auto"', "'auto'")
WRITABLE_KEYS = {
    "model": (*SIZED_OPTIONS, "fast_inference", "dtype"),
    "lora": ("use_gradient_checkpointing", "target_modules"),
    "grpo": ("per_device_train_batch_size", "gradient_accumulation_steps"),
}


def write_chosen_values(document: Document, resolved: RunConfig) -> str:
    """Rewrite the run file, and return a text that lists the value that was written for each key.

    Only the characters of each "auto" are replaced. Comments, order, line ends and the quoting of
    other values are kept.

    Raises ConfigError if the document is standard input, or if other values would change too.
    """
    source = document.source
    if source.path is None:
        raise ConfigError("standard input cannot be rewritten", fix="give the path of the run file")
    edits: list[tuple[int, int, str, str]] = []
    not_written: list[str] = []
    expected = parse_source(source).root.to_plain()
    for section, names in WRITABLE_KEYS.items():
        for name in names:
            node = document.find_node((section, name))
            if node is None or node.value != "auto":
                continue
            section_values = getattr(resolved, section)
            value = section_values[name] if section == "grpo" else getattr(section_values, name)
            if value == "auto":
                continue
            start, end, value_text = (
                node.position.start,
                node.position.end,
                _format_value(value, node),
            )
            if node.source is not source:
                not_written.append(
                    f'not written: {section}.{name}: {value_text} (this "auto" is in '
                    f"{node.source.name})"
                )
            elif source.text[start:end] not in PLAIN_AUTO:
                not_written.append(
                    f'not written: {section}.{name}: {value_text} (this "auto" is a YAML alias, '
                    "anchor or block)"
                )
            else:
                edits.append((start, end, value_text, name))
                expected[section][name] = list(value) if isinstance(value, tuple) else value
    text = source.text
    for start, end, value_text, _ in sorted(edits, reverse=True):
        text = text[:start] + value_text + text[end:]
    if parse_source(replace(source, text=text)).root.to_plain() != expected:
        raise ConfigError(
            "the chosen values cannot be written without changing other values of the file",
            where=source.name,
            fix="replace the YAML aliases in the run file by their values, so that each key has "
            "its own value",
        )
    if edits:
        with report_write_errors(source.path):
            rewrite_file(source.path, source.bom + text)
    lines = [f"{source.name}: {name}: {value_text}" for _, _, value_text, name in sorted(edits)]
    return "\n".join(lines + not_written) or f'{source.name}: contains no "auto"'


def _format_value(value: object, node: Node) -> str:
    """Return the value as text in the format of the run file (YAML, TOML or JSON)."""
    if isinstance(value, str) and node.source.format == "yaml":
        return value
    return json.dumps(value)
