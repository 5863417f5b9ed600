"""The adapters of environments, and the packages that they need."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.config.trl_names import Package, installed

if TYPE_CHECKING:
    from toolkit.config.run_config import EnvironmentSection

ADAPTERS = {
    "reasoning_gym": Package(("reasoning_gym",), "'reasoning-gym>=0.1.25,<0.2'"),
    "verifiers": Package(("verifiers",), "'verifiers>=0.4,<0.5'"),
    "openenv": Package(("openenv",), "'openenv>=0.10'"),
}
IN_STEPS = ("openenv",)
"""Adapters with a tool, whose rollouts act in the environment over several turns."""


def task_module(adapter: str, task: str) -> str | None:
    """The user's module that a task names; None if the adapter's package provides all tasks."""
    if adapter == "reasoning_gym":
        return None
    # verifiers imports the module of this name for the id owner/name@version
    if adapter == "verifiers":
        return task.rsplit("/", 1)[-1].split("@", 1)[0].replace("-", "_").lower()
    return task.partition(":")[0]


def missing_package(adapter: str, python: str | None) -> Package | None:
    """The package of an adapter if it is not installed for the interpreter of the environment, else
    None. Nothing is imported and no interpreter is started: a virtual environment is read as files.
    None also if this cannot be found out.
    """
    package = ADAPTERS[adapter]
    if python is None:
        return None if installed(package) else package
    folders = list(Path(python).parent.parent.glob("lib/python3*/site-packages"))
    there = any((folder / module).exists() for folder in folders for module in package.modules)
    return package if folders and not there else None


def absent(section: EnvironmentSection | None) -> tuple[str, ...]:
    """The missing package of a run's environment, with the command that installs it; empty if none
    is missing.
    """
    if section is None:
        return ()
    missing = missing_package(section.adapter, section.python)
    return (
        () if missing is None else (f"{missing.modules[0]} ({pip_line(missing, section.python)})",)
    )


def is_interpreter(python: str) -> bool:
    """Whether the path is a file that can be executed."""
    return Path(python).is_file() and os.access(python, os.X_OK)


def pip_line(package: Package, python: str | None) -> str:
    """The command that installs ``package`` for the interpreter ``python``."""
    return f"{python + ' -m ' if python else ''}pip install {package.install}"
