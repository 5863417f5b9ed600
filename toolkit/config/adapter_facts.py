"""Facts of the adapter of ``lora.adapter_path``, read from its adapter_config.json."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.config.model_facts import ADAPTER_CONFIG, read_json
from toolkit.config.run_paths import resolve

if TYPE_CHECKING:
    from pathlib import Path

    from toolkit.config.document import Node

INHERITED = (
    "r", "lora_alpha", "target_modules", "lora_dropout", "bias", "use_rslora", "use_dora",
    "layers_to_transform", "layers_pattern", "exclude_modules", "rank_pattern", "alpha_pattern",
    "modules_to_save",
)  # fmt: skip
"""Keys of the ``lora`` section that an adapter sets."""


def read_adapter(folder: Path) -> dict[str, Any] | None:
    """The adapter_config.json of a folder; None if it is missing or unreadable."""
    values = read_json(folder / ADAPTER_CONFIG)
    return values if isinstance(values, dict) else None


def inherited(node: Node | None) -> dict[str, Any]:
    """The settings of the adapter that the node of ``lora.adapter_path`` names, as plain values of
    the ``lora`` section.
    """
    if node is None or not isinstance(node.value, str):
        return {}
    values = read_adapter(resolve(node.value, node)) or {}
    found = {name: values[name] for name in INHERITED if values.get(name) is not None}
    alpha = found.get("lora_alpha")
    if isinstance(alpha, float) and alpha.is_integer():
        found["lora_alpha"] = int(alpha)
    if isinstance(found.get("target_modules"), list):
        found["target_modules"] = sorted(map(str, found["target_modules"]))
    return found
