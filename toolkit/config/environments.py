"""List the environment adapters, and find the Python packages that a run needs but that are not
installed. An environment is a package of tasks. An environment adapter connects one kind of
environment to the toolkit.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.config.trl_names import Package, is_installed, packages_for_grpo

if TYPE_CHECKING:
    from toolkit.config.run_config import RunConfig

ADAPTERS = {
    "reasoning_gym": Package(("reasoning_gym",), "'reasoning-gym>=0.1.25,<0.2'"),
    "verifiers": Package(("verifiers",), "'verifiers>=0.4,<0.5'"),
    "openenv": Package(("openenv",), "'openenv>=0.10'"),
}
MULTI_TURN_ADAPTERS = ("openenv",)
"""The adapters whose rollouts have several turns, in which the model acts by calling a tool."""


def task_module(adapter: str, task: str) -> str | None:
    """Return the name of the user's module that contains ``task``. ``adapter`` is the name of an
    environment adapter. Return None for reasoning_gym, whose own package contains all its tasks.
    """
    if adapter == "reasoning_gym":
        return None
    # for the id owner/name@version, verifiers imports a module named like the id's middle part
    if adapter == "verifiers":
        return task.rsplit("/", 1)[-1].split("@", 1)[0].replace("-", "_").lower()
    return task.partition(":")[0]


def missing_package(adapter: str, python: str | None) -> Package | None:
    """Return the Python package that an environment adapter needs, if it is not installed for the
    interpreter ``python`` (None: the current one). Return None if the package is installed, or if
    this cannot be determined.

    Only the files of the interpreter's virtual environment are inspected. Nothing is imported and
    no interpreter is started.
    """
    package = ADAPTERS[adapter]
    if python is None:
        return None if is_installed(package) else package
    folders = site_packages(python)
    is_installed_there = any(
        (folder / module).exists() for folder in folders for module in package.modules
    )
    return package if folders and not is_installed_there else None


def site_packages(python: str) -> list[Path]:
    """Return the site-packages folders of the virtual environment to which the interpreter
    ``python`` belongs.
    """
    return list(Path(python).parent.parent.glob("lib/python3*/site-packages"))


def describe_missing_packages(config: RunConfig) -> tuple[str, ...]:
    """Return one text for each package that the run needs and that is not installed. Each text
    contains the name of the package and the command that installs it. The trackers, the optimizer
    and the environment of a run can need packages.
    """
    section = config.environment
    missing = None if section is None else missing_package(section.adapter, section.python)
    lines = [
        f"{package.modules[0]} (pip install {package.install}, for grpo.{key}: {value})"
        for key, value, package in packages_for_grpo(config.grpo)
        if not is_installed(package)
    ]
    if section is not None and missing is not None:
        lines.append(f"{missing.modules[0]} ({pip_command(missing, section.python)})")
    return tuple(lines)


def is_interpreter(python: str) -> bool:
    """Whether ``python`` is the path of an executable file."""
    return Path(python).is_file() and os.access(python, os.X_OK)


def pip_command(package: Package, python: str | None) -> str:
    """Return the command that installs ``package`` for the interpreter ``python`` (None: the
    current one).
    """
    return f"{python + ' -m ' if python else ''}pip install {package.install}"
