"""Small helpers that notebooks import in addition to the model and the trainer."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers.utils import is_torch_bf16_gpu_available

from toolkit.base.errors import ToolkitWarning


def is_bfloat16_supported() -> bool:
    """Whether this machine can train in bfloat16: true on a GPU that supports the format, and on a
    CPU.
    """
    return not torch.cuda.is_available() or bool(is_torch_bf16_gpu_available())


is_bf16_supported = is_bfloat16_supported


def PatchFastRL(  # noqa: N802 - the drop-in name
    algorithm: str | None = None,
    FastLanguageModel: Any = None,
) -> None:
    """Does not patch anything; a warning names the trainer to import."""
    del algorithm, FastLanguageModel
    warnings.warn(
        "PatchFastRL does nothing: `from toolkit import GRPOConfig, GRPOTrainer` in place of trl's"
        " uses the engine on the model",
        ToolkitWarning,
        stacklevel=2,
    )


def vLLMSamplingParams(**kwargs: Any) -> dict[str, Any]:  # noqa: N802 - the drop-in name
    """The sampling options for ``GRPOConfig(vllm_sampling_params=...)``."""
    return dict(kwargs)
