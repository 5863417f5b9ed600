"""Build the frozen RunConfig from a validated document. Relative paths in a file are resolved
against the folder of that file.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from toolkit.config.adapter_facts import inherited_settings
from toolkit.config.run_config import (
    DatasetSection,
    EnvironmentSection,
    LoraSection,
    ModelSection,
    RewardFunction,
    RewardSection,
    RunConfig,
    RuntimeSection,
    ToolsSection,
)
from toolkit.config.run_paths import local_path

if TYPE_CHECKING:
    from collections.abc import Mapping

    from toolkit.config.document import Document, Node

_FLOAT_KEYS = ("lora_dropout", "timeout_s")
# Keys whose value may be a file or a folder. run_paths.local_path decides whether a value is a path
# or a hub id.
_PATH_KEYS = ("model_name", "path", "eval_path", "output_dir", "resume", "adapter_path", "python")


def build_config(document: Document) -> RunConfig:
    """Return the frozen RunConfig of ``document``, which must not have errors."""
    root = document.root
    sections = {
        name: _section_values(root.value.get(name))
        for name in ("model", "lora", "dataset", "runtime", "reward")
    }
    for name, value in inherited_settings(document.find_node(("lora", "adapter_path"))).items():
        sections["lora"].setdefault(name, freeze(value))
    grpo = dict(_section_values(root.value.get("grpo")))
    functions = list(sections["reward"].pop("functions", ()))
    weights = grpo.pop("reward_weights", None) or [None] * len(functions)
    rewards = tuple(
        RewardFunction(
            name=function["name"],
            weight=float(function.get("weight", 1.0) if weight is None else weight),
            options=function.get("options", MappingProxyType({})),
        )
        for function, weight in zip(functions, weights, strict=True)
    )
    environment_values = _section_values(root.value.get("environment"))
    environment = EnvironmentSection(**environment_values) if environment_values else None
    tool_values = _section_values(root.value.get("tools"))
    return RunConfig(
        model=ModelSection(**sections["model"]),
        lora=LoraSection(**sections["lora"]),
        dataset=DatasetSection(**sections["dataset"]),
        reward=RewardSection(
            functions=_with_environment_reward(rewards, environment), **sections["reward"]
        ),
        grpo=MappingProxyType(grpo),
        runtime=RuntimeSection(**sections["runtime"]),
        environment=environment,
        tools=ToolsSection(**tool_values) if tool_values else None,
        source=str(document.source.path) if document.source.path else None,
    )


def _with_environment_reward(
    rewards: tuple[RewardFunction, ...], environment: EnvironmentSection | None
) -> tuple[RewardFunction, ...]:
    """Return ``rewards`` with the environment's own reward appended. Return ``rewards`` unchanged
    if it already contains the environment's reward. This is the case if the run file sets the
    weight of that reward, or if the run file is the config.json of an earlier run.
    """
    if environment is None or any(reward.name == environment.adapter for reward in rewards):
        return rewards
    options = MappingProxyType({"task": environment.task, "settings": environment.options})
    return (*rewards, RewardFunction(name=environment.adapter, options=options))


def _section_values(node: Node | None) -> dict[str, Any]:
    if node is None:
        return {}
    return {key: _field_value(key, child) for key, child in node.value.items()}


def _field_value(key: str, node: Node) -> Any:
    if key in _PATH_KEYS and isinstance(node.value, str):
        return local_path(key, node)
    if key in _FLOAT_KEYS and type(node.value) is int:
        return float(node.value)
    return freeze(node.to_plain())


def freeze(value: object) -> Any:
    """Return a read-only copy of a value. At every level, lists become tuples, and mappings become
    read-only mappings.
    """
    if isinstance(value, dict):
        frozen: Mapping[str, Any] = MappingProxyType(
            {key: freeze(item) for key, item in value.items()}
        )
        return frozen
    if isinstance(value, list):
        return tuple(freeze(item) for item in value)
    return value


def thaw(value: object) -> Any:
    """Undo ``freeze``: return a copy of the value with plain lists and dicts. JSON and some
    libraries require these types.
    """
    if isinstance(value, (dict, MappingProxyType)):
        return {key: thaw(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [thaw(item) for item in value]
    return value
