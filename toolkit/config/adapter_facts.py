"""Read adapter_config.json of the adapter that ``lora.adapter_path`` names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.config.model_facts import ADAPTER_CONFIG, read_json
from toolkit.config.run_paths import resolve_path
from toolkit.config.supported_features import REWRITING_INITS, Problem

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from toolkit.config.document import Node

INHERITED = (
    "r", "lora_alpha", "target_modules", "lora_dropout", "bias", "use_rslora", "use_dora",
    "layers_to_transform", "layers_pattern", "exclude_modules", "rank_pattern", "alpha_pattern",
    "modules_to_save",
)  # fmt: skip
"""Keys of the ``lora`` section whose values come from adapter_config.json if the run file does not
set them.
"""

API_ONLY = ("lora_bias", "target_parameters", "trainable_token_indices")
"""Fields of adapter_config.json that ``get_peft_model`` can set, but a run file cannot."""

KEPT = ("base_model_name_or_path", "revision", "fan_in_fan_out")
BOOKKEEPING = (*KEPT, "peft_type", "task_type", "peft_version", "inference_mode", "auto_mapping")
"""Fields of adapter_config.json that do not change the shape of the adapter."""

SUPPORTED = (*INHERITED, *API_ONLY, "init_lora_weights", "loftq_config")
"""Fields that determine the shape of an adapter and that this module reads. An adapter whose file
sets any other such field is refused.
"""

PEFT_DEFAULTS = {"megatron_core": "megatron.core", "qalora_group_size": 16}
"""Fields that PEFT 0.21 always writes into adapter_config.json, with the values that it writes.
tests/contract compares them with PEFT.
"""


def read_adapter(folder: Path) -> dict[str, Any] | None:
    """Return the content of adapter_config.json in ``folder``; None if the file is missing or
    unreadable.
    """
    values = read_json(folder / ADAPTER_CONFIG)
    return values if isinstance(values, dict) else None


def inherited_settings(node: Node | None) -> dict[str, Any]:
    """Return the settings of the adapter in the folder ``lora.adapter_path``, as a dict from keys
    of the ``lora`` section to values. The dict is empty if the folder has no readable
    adapter_config.json. ``node`` is the node of ``lora.adapter_path`` in the run file.
    """
    if node is None or not isinstance(node.value, str):
        return {}
    values = read_adapter(resolve_path(node.value, node)) or {}
    settings = {name: values[name] for name in INHERITED if values.get(name) is not None}
    alpha = settings.get("lora_alpha")
    if isinstance(alpha, float) and alpha.is_integer():
        settings["lora_alpha"] = int(alpha)
    if isinstance(settings.get("target_modules"), list):
        settings["target_modules"] = sorted(map(str, settings["target_modules"]))
    return settings


def unsupported_fields(values: Mapping[str, Any]) -> list[str]:
    """Return the names of the fields of adapter_config.json that this toolkit does not read, and
    whose value is not PEFT's default. ``values`` is the content of adapter_config.json.
    """
    return [
        name
        for name, value in values.items()
        if name not in (*SUPPORTED, *BOOKKEEPING) and value and value != PEFT_DEFAULTS.get(name)
    ]


def start_problem(values: Mapping[str, Any]) -> Problem | None:
    """Return the reason why training cannot start from an adapter; None if it can. ``values`` is
    the content of the adapter's adapter_config.json. Validation and the loader both call this
    function.
    """
    init = values.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(REWRITING_INITS):
        return Problem(
            "lora.adapter_path",
            f"the adapter was initialized with {init}, which rewrote the base weights. The "
            "adapter fits only the rewritten base weights, not the checkpoint that "
            "model.model_name names",
            hint="convert the adapter with PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion="
            "...), or start from an adapter with init_lora_weights true",
        )
    for name in (*API_ONLY, *unsupported_fields(values)):
        if values.get(name):
            return Problem(
                "lora.adapter_path",
                f"the adapter sets {name}, but the lora section has no key for {name}. The "
                "adapter's size and layers would differ from those in the run file",
                hint="start from an adapter on linear layers that sets only keys of the lora"
                " section",
            )
    return None
