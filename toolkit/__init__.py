"""Reproducible GRPO fine-tuning with LoRA. vLLM samples on the GPU that trains the model.

``from toolkit import FastLanguageModel, GRPOTrainer`` imports torch. ``import toolkit`` alone does
not, because these names are imported on first use (PEP 562).
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolkit.policy.fast_models import FastModel, FastVisionModel
    from toolkit.policy.language_model import FastLanguageModel
    from toolkit.policy.notebook_templates import get_chat_template, standardize_sharegpt
    from toolkit.train.notebook import (
        PatchFastRL,
        is_bf16_supported,
        is_bfloat16_supported,
        vLLMSamplingParams,
    )
    from toolkit.train.trainer import GRPOConfig, GRPOTrainer

from toolkit.base.garbage_collection import collector_paused
from toolkit.base.version import __version__

__all__ = [
    "FastLanguageModel",
    "FastModel",
    "FastVisionModel",
    "GRPOConfig",
    "GRPOTrainer",
    "PatchFastRL",
    "__version__",
    "get_chat_template",
    "is_bf16_supported",
    "is_bfloat16_supported",
    "standardize_sharegpt",
    "vLLMSamplingParams",
]

_MODULE_BY_NAME = {
    "FastLanguageModel": "toolkit.policy.language_model",
    **dict.fromkeys(("FastModel", "FastVisionModel"), "toolkit.policy.fast_models"),
    **dict.fromkeys(("GRPOConfig", "GRPOTrainer"), "toolkit.train.trainer"),
    **dict.fromkeys(
        ("get_chat_template", "standardize_sharegpt"), "toolkit.policy.notebook_templates"
    ),
    **dict.fromkeys(
        ("PatchFastRL", "is_bf16_supported", "is_bfloat16_supported", "vLLMSamplingParams"),
        "toolkit.train.notebook",
    ),
}
_UNSUPPORTED_NAMES = {
    "FastTextModel": "use FastLanguageModel",
    "FastSentenceTransformer": "the toolkit cannot train embedding models",
    "FastDiffusionModel": "the toolkit trains only language models",
    "PatchDPOTrainer": "TRL needs no patch here: use trl.DPOTrainer on the model",
    "PatchKTOTrainer": "TRL needs no patch here: use trl.KTOTrainer on the model",
    "SFTTrainer": "use trl.SFTTrainer",
    "SFTConfig": "use trl.SFTConfig",
    "UnslothTrainer": "use trl.SFTTrainer for supervised fine-tuning, GRPOTrainer for rewards",
    "UnslothTrainingArguments": "use trl.SFTConfig, or GRPOConfig for rewards",
    "UnslothVisionDataCollator": "the toolkit trains only on text",
    "unsloth_train": "call trainer.train()",
    "train_on_responses_only": "use trl.SFTConfig(assistant_only_loss=True)",
    "apply_chat_template": "GRPOTrainer itself applies the template to a prompt column of messages",
    "to_sharegpt": "use standardize_sharegpt, which renames from and value to role and content",
}
"""Names that notebooks import from Unsloth, each with what to use instead."""


def __getattr__(name: str) -> Any:
    if name in _UNSUPPORTED_NAMES:
        # If this were an AttributeError, Python would print its own text and omit the advice.
        raise ImportError(f"toolkit has no {name}: {_UNSUPPORTED_NAMES[name]}", name="toolkit")
    if name not in _MODULE_BY_NAME:
        raise AttributeError(f"module 'toolkit' has no attribute {name!r}")
    from importlib import import_module  # noqa: PLC0415 - imported on first use, so that the import of the package stays fast

    from toolkit.train.logging_setup import hide_false_vllm_errors  # noqa: PLC0415 - as above

    hide_false_vllm_errors()
    module_name = _MODULE_BY_NAME[name]
    with nullcontext() if module_name in sys.modules else collector_paused():
        module = import_module(module_name)
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
