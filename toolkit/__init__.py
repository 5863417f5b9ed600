"""GRPO fine-tuning with LoRA on a model that has a vLLM engine on it, made reproducible.

``from toolkit import FastLanguageModel, GRPOTrainer`` loads torch on first use; ``import toolkit``
alone does not (PEP 562).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolkit.policy.language_model import FastLanguageModel
    from toolkit.train.trainer import GRPOConfig, GRPOTrainer

from toolkit.base.version import __version__

__all__ = ["FastLanguageModel", "GRPOConfig", "GRPOTrainer", "__version__"]

_LAZY = {
    "FastLanguageModel": "toolkit.policy.language_model",
    "GRPOConfig": "toolkit.train.trainer",
    "GRPOTrainer": "toolkit.train.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'toolkit' has no attribute {name!r}")
    from importlib import import_module  # noqa: PLC0415 - on first use, so that the light floor stays light

    from toolkit.train.logging_setup import ignore_false_alarms  # noqa: PLC0415 - the same

    ignore_false_alarms()
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
