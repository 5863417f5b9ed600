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


def PatchFastRL(  # noqa: N802 - Unsloth's name
    algorithm: str | None = None,
    FastLanguageModel: Any = None,
) -> None:
    """Do nothing except warn. The warning shows the import that replaces this function."""
    del algorithm, FastLanguageModel
    warnings.warn(
        "PatchFastRL does nothing. To sample with the vLLM engine of the model, replace the imports"
        " from trl by `from toolkit import GRPOConfig, GRPOTrainer`",
        ToolkitWarning,
        stacklevel=2,
    )


def vLLMSamplingParams(**kwargs: Any) -> dict[str, Any]:  # noqa: N802 - Unsloth's name
    """Return the sampling options for ``GRPOConfig(vllm_sampling_params=...)``."""
    return dict(kwargs)
