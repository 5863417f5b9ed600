"""Start vLLM in this process. This module imports neither torch nor vLLM until ``open_engine``
runs.
"""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING

from toolkit.base.errors import ConfigError, MissingExtraError
from toolkit.base.read_ahead import free_bytes, read_ahead
from toolkit.engine.rollout_engine import vllm_available

if TYPE_CHECKING:
    from toolkit.engine.engine import Engine
    from toolkit.engine.engine_options import EngineOptions

REQUIRED_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""Weight sharing needs these values: the engine's core must run in this process."""

DEFAULT_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # FlashInfer's sampler is compiled on first use and needs a CUDA toolkit, which the run-time
    # image does not have; and it does not support processed log-probabilities.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}
"""Values that are set unless the user has set the variables."""


def open_engine(options: EngineOptions) -> Engine:
    """Start vLLM on ``options.model`` in this process. The result is a context manager; ``close``
    frees the memory.

    Raises:
        MissingExtraError: vLLM is not installed.
        UnsupportedError: FP8 weights, an architecture that vLLM does not know, or for which it does
            not support LoRA.
        ConfigError, NodeError, RetryError: vLLM did not start; the message names the check that
            explains the failure, and a fix.
    """
    if not vllm_available():
        raise MissingExtraError(
            "fast_inference needs vLLM, which is not installed",
            where="model.fast_inference",
            fix=(
                "pip install 'grpo-toolkit[cuda]' (CUDA) or 'grpo-toolkit[cpu-engine]'"
                " (CPU), or set fast_inference: false"
            ),
        )
    prepare_environment()
    read_ahead(options.model, free_bytes())
    # Imported here, because vLLM reads its environment during the import, which takes seconds.
    from toolkit.engine.start import start  # noqa: PLC0415

    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # hides warnings of upstream during import and start, but no errors
        return start(options)


def prepare_environment() -> None:
    """Set vLLM's environment variables; values that the user has set are kept.

    Raises:
        ConfigError: the user has set a variable to a value that prevents weight sharing.
    """
    for name, value in REQUIRED_ENVIRONMENT.items():
        found = os.environ.setdefault(name, value)
        if found != value:
            raise ConfigError(
                f"{name}={found} puts the engine into another process, where its"
                " weights cannot be shared",
                where=f"environment variable {name}",
                fix=f"unset {name}",
            )
    for name, value in DEFAULT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
