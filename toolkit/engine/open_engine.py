"""Start vLLM in this process. This module imports neither torch nor vLLM until ``open_engine``
runs.
"""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING

from toolkit.base.errors import ConfigError, MissingExtraError
from toolkit.base.garbage_collection import collector_paused
from toolkit.base.read_ahead import read_ahead, unused_memory_bytes
from toolkit.engine.rollout_engine import vllm_available

if TYPE_CHECKING:
    from toolkit.engine.engine import Engine
    from toolkit.engine.engine_options import EngineOptions

REQUIRED_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""Environment variables with the values that weight sharing needs. The value 0 makes vLLM run the
engine's core in this process.
"""

DEFAULT_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # FlashInfer's sampler does not support processed log-probabilities. Also, it is compiled on
    # first use and needs NVIDIA's CUDA toolkit, which the run-time image does not have.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}
"""Environment variables that are set to these values, if the user has not set them."""


def open_engine(options: EngineOptions) -> Engine:
    """Start vLLM with ``options.model`` in this process. The returned engine is a context manager,
    and its ``close`` frees the memory.

    Raises:
        MissingExtraError: vLLM is not installed.
        UnsupportedError: the model has FP8 weights, or an architecture for which vLLM has no model
            class or no LoRA support.
        ConfigError, NodeError, RetryError: vLLM did not start. If the cause is known, the message
            names the check of `envcheck check` that detects the cause.
    """
    if not vllm_available():
        raise MissingExtraError(
            "fast_inference needs vLLM, which is not installed",
            where="model.fast_inference",
            fix=(
                "run `pip install 'grpo-toolkit[cuda]'` (for a GPU) or `pip install "
                "'grpo-toolkit[cpu-engine]'` (for a CPU), or set `fast_inference: false`"
            ),
        )
    prepare_environment()
    read_ahead(options.model, unused_memory_bytes())
    # Imported here, because vLLM reads its environment variables during the import. The import also
    # takes seconds.
    with collector_paused():
        from toolkit.engine.start import start_engine  # noqa: PLC0415

    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # hides warnings of vLLM and its libraries during import and start, but no errors
        return start_engine(options)


def prepare_environment() -> None:
    """Set vLLM's environment variables. Values that the user has set are kept.

    Raises:
        ConfigError: the user has set a variable to a value that prevents weight sharing.
    """
    for name, value in REQUIRED_ENVIRONMENT.items():
        actual = os.environ.setdefault(name, value)
        if actual != value:
            raise ConfigError(
                f"{name}={actual} makes vLLM run the engine in another process, where the trainer"
                " cannot share its weights",
                where=f"environment variable {name}",
                fix=f"unset {name}",
            )
    for name, value in DEFAULT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
