"""Turn exceptions inside a training step into errors for the user: out of memory, a failed GPU, a
full disk and others.

Each error has an exit code that a scheduler can act on. After an out-of-memory error,
``step_retry.py`` first retries the step in smaller parts if the gradient stays the same.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING

import torch

from toolkit.base import disk_errors
from toolkit.base.errors import ConfigError, NodeError, RetryError, ToolkitError, first_line
from toolkit.base.symptoms.errors import RESTART_ADVICE, explain_error
from toolkit.engine.oom_backoff import is_out_of_memory
from toolkit.policy.machine_facts import cuda_in_use
from toolkit.train.upstream_errors import as_config_error

if TYPE_CHECKING:
    from toolkit.config.run_config import RunConfig

logger = logging.getLogger(__name__)

# The texts of CUDA errors about failed hardware, among them the driver API errors 46, 214, 719 and
# 999.
_GPU_FAILURE = re.compile(
    r"CUDA(?: driver)? error:? .*(?:uncorrectable|ECC|unspecified launch failure|unknown error"
    r"|devices? unavailable|hardware|no CUDA-capable device|device not ready|NVLink|lost)"
    r"|GPU is lost|fallen off the bus|NCCL error.*(?:unhandled cuda error|remote process exited)",
    re.I | re.S,
)


def release_memory() -> None:
    """Free the cached blocks of torch's allocator, so that a smaller request fits."""
    if cuda_in_use():
        torch.cuda.empty_cache()


def translate(error: Exception, where: str, config: RunConfig | None = None) -> ToolkitError | None:
    """Turn an exception into an error for the user, with an exit code that a scheduler can act on.

    An exception that another library raises while it uses keys of ``config`` becomes an error about
    these keys (train/upstream_errors). The result is None if the exception is unknown, which means
    that the toolkit has a defect.
    """
    if isinstance(error, ToolkitError):
        return error
    message = f"{type(error).__name__}: {first_line(error)}"
    if (disk_error := disk_errors.to_toolkit_error(error, where)) is not None:
        return disk_error
    if isinstance(error, IsADirectoryError):  # write_file raises this when it renames onto a folder
        return ConfigError(
            "the run must write a file at this path, but there is a folder",
            where=str(error.filename2 or error.filename or where),
            fix="move the folder away, or set --output-dir to another folder",
        )
    if type(error).__module__.partition(".")[0] in ("huggingface_hub", "httpx"):
        return ConfigError(
            f"the Hugging Face Hub: {message}",
            where=where,
            fix="check the network, and check the login with `hf auth whoami`. Or remove the key "
            "grpo.log_completions_hub_repo, so that the run does not use the Hub",
        )
    known_error = explain_error(error, "the run failed", RESTART_ADVICE)
    if known_error is not None and known_error.exit_code == RetryError.exit_code:
        return known_error
    if is_out_of_memory(error):
        return ConfigError(
            f"out of memory, even with the micro-batch split into the smallest parts: {message}",
            where=where,
            fix="lower grpo.per_device_train_batch_size or grpo.max_completion_length (`envcheck "
            "size` shows the memory budget). Then run the same command again to resume the run",
        )
    if "parameters that were not used in producing loss" in str(error):
        return ConfigError(
            (
                "some trainable parameters do not take part in the loss. By default, training with "
                "several processes does not support such parameters"
            ),
            where=where,
            fix="set grpo.ddp_find_unused_parameters: true, or use fewer lora.target_modules",
        )
    if "does not have a deterministic implementation" in str(error):
        return ConfigError(
            f"a kernel of this run has no deterministic implementation: {message}",
            where=where,
            fix="remove grpo.full_determinism, and set runtime.reproducible: true, which uses "
            "deterministic kernels where they exist",
        )
    if _GPU_FAILURE.search(f"{type(error).__name__}: {error}"):
        return NodeError(
            f"the GPU failed during the run: {message}",
            where=where,
            fix="run `envcheck check` on this node, and run the same command on another node: the "
            "run resumes from the last checkpoint",
        )
    config_error = (
        None if config is None else as_config_error(error, config.grpo, config.source or where)
    )
    return config_error or known_error
