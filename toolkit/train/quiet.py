"""Upstream libraries talk to their own developers; here they are kept to what a user can act on."""

from __future__ import annotations

import logging
import os
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ENVIRONMENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    # TRL imports vLLM where it is installed.
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    # cuBLAS is deterministic only with a workspace that is fixed before its first call.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}
"""Set where the user has not, before the libraries are imported."""

LOUD = ("transformers", "trl", "accelerate", "datasets", "peft", "torch", "huggingface_hub")


def prepare_environment() -> None:
    """Before torch and transformers are imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Told while vLLM is imported, before its own log level holds.
    logging.getLogger("vllm.triton_utils.importing").setLevel(logging.ERROR)


@contextmanager
def quiet(*, debug: bool) -> Iterator[None]:
    """Errors only from upstream's loggers, and none of its Python warnings; all of them with
    ``debug``.
    """
    if debug:
        yield
        return
    from datasets.utils import logging as datasets_logging  # noqa: PLC0415 - heavy
    from transformers.utils import logging as transformers_logging  # noqa: PLC0415 - heavy

    levels = {name: logging.getLogger(name).level for name in LOUD}
    for name in LOUD:
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets_logging.set_verbosity_error()
    datasets_logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
