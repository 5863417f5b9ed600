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
"""Without these there is nothing to share: the engine's core must live in this process."""

DEFAULT_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # Compiled on first use, with a CUDA toolkit that the run-time image has not; and not used with
    # processed log-probabilities.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}
"""Set where the user has not."""


def open_engine(options: EngineOptions) -> Engine:
    """vLLM on ``options.model``, in this process. A context manager; ``close`` it to get the memory
    back.

    Raises:
        MissingExtraError: vLLM is not installed.
        UnsupportedError: FP8 weights, an architecture that vLLM does not know, or that takes no
        LoRA. ConfigError, NodeError, RetryError: vLLM did not start; the message names the check
        that explains it, and what to do.
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
    # vLLM reads its environment while it is imported, and the import takes seconds: hence here.
    from toolkit.engine.start import start  # noqa: PLC0415

    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # upstream's own, while it imports and starts; errors are not touched
        return start(options)


def prepare_environment() -> None:
    """Set vLLM's variables; values that the user has set stay.

    Raises:
        ConfigError: the user has set one to a value under which nothing can be shared.
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
