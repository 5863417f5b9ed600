"""``envcheck size --write``: the choice in place of each written "auto", everything else
untouched.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from toolkit.base.errors import ConfigError
from toolkit.base.paths import rewrite_file
from toolkit.cli.exits import writing

if TYPE_CHECKING:
    from toolkit.config.document import Document, Node
    from toolkit.config.model import RunConfig

WRITABLE = {
    "model": (
        "max_lora_rank",
        "gpu_memory_utilization",
        "max_num_seqs",
        "max_num_batched_tokens",
        "enable_sleep_mode",
        "fast_inference",
        "dtype",
    ),
    "lora": ("use_gradient_checkpointing", "target_modules"),
    "grpo": ("per_device_train_batch_size", "gradient_accumulation_steps"),
}


def write_choice(document: Document, resolved: RunConfig) -> str:
    """Rewrite the run file and say what was put where.

    Comments, order, quoting of other values and line ends stay: only the characters of each
    "auto" are replaced.

    Raises:
        ConfigError: the document has no file of its own (standard input).
    """
    source = document.source
    if source.path is None:
        raise ConfigError("standard input cannot be rewritten", fix="give the file by name")
    edits: list[tuple[int, int, str, str]] = []
    elsewhere: list[str] = []
    for section, names in WRITABLE.items():
        for name in names:
            node = document.node((section, name))
            if node is None or node.value != "auto":
                continue
            part = getattr(resolved, section)
            value = part[name] if section == "grpo" else getattr(part, name)
            if value == "auto":
                continue
            if node.source is not source:
                elsewhere.append(f"{section}.{name}: {_spelled(value, node)} ({node.source.name})")
                continue
            edits.append((node.mark.start, node.mark.end, _spelled(value, node), name))
    text = source.text
    for start, end, spelled, _ in sorted(edits, reverse=True):
        text = text[:start] + spelled + text[end:]
    if edits:
        with writing(source.path):
            rewrite_file(source.path, source.bom + text)
    lines = [f"{source.name}: {name}: {spelled}" for _, _, spelled, name in sorted(edits)]
    lines += [f"not written, it stands in another file: {line}" for line in elsewhere]
    return "\n".join(lines) or f'{source.name}: no "auto" is written there'


def _spelled(value: Any, node: Node) -> str:
    """The value as a scalar of the file's format."""
    if isinstance(value, str) and node.source.format == "yaml":
        return value
    return json.dumps(value)
