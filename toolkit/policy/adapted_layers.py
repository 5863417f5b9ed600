"""Choose the layers of a loaded model that get an adapter, and reject those that the engine does
not support.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from toolkit.base.errors import ToolkitWarning, UnsupportedError
from toolkit.config.lora_targets import MLP, default_targets, expert_targets, has_experts

if TYPE_CHECKING:
    from toolkit.policy.lora_settings import LoraSettings


def default_for(model: Any) -> tuple[str, ...]:
    """The layers that are adapted if the user names none (``config.targets.default_targets``)."""
    return default_targets(model.config.to_dict())


def told_default(model: Any) -> tuple[str, ...]:
    """``default_for``, with a warning if it differs from the drop-in API's seven projections."""
    chosen = default_for(model)
    if has_experts(model.config.to_dict()):
        warnings.warn(
            f"the model is a mixture of experts: the adapter is on {', '.join(chosen)}; set "
            "target_modules to adapt other layers",
            ToolkitWarning,
            stacklevel=4,
        )
    return chosen


def experts_of(settings: LoraSettings, model: Any) -> frozenset[str]:
    """The targets that PEFT applies to the experts of this model."""
    if not has_experts(model.config.to_dict()):
        return frozenset()
    return expert_targets(model.config.model_type, settings.target_modules)


def refuse_experts(found: frozenset[str], where: str) -> None:
    """For a model with an engine. Raises UnsupportedError if experts would be adapted."""
    if found:
        names = ", ".join(name for name in MLP if name in found)
        raise UnsupportedError(
            f"target_modules: {names} are the experts of this model, and the engine has no LoRA"
            " slots for them",
            where=where,
            fix="target the attention projections, or load with fast_inference=False",
        )
