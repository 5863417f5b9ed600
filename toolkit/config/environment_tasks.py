"""Check whether the task of an environment exists. The check only reads files. It does not run code
of a package or of the user.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from toolkit.base.did_you_mean import nearest
from toolkit.config.code import FunctionFacts, find_name, module_file
from toolkit.config.environments import ADAPTERS, site_packages, task_module
from toolkit.config.libraries import package_folder

if TYPE_CHECKING:
    from collections.abc import Sequence

_BUILT_IN_PACKAGE = "verifiers.v1.tasksets"
"""The package in which verifiers 0.4 looks for a taskset before it looks on the Python path."""
_TASK_NAME = re.compile(
    r"""^(?:DATASET_NAME\s*=|register_dataset\()\s*["']([^"'\n]+)["']""", re.MULTILINE
)
"""How modules of reasoning-gym 0.1.25 write the name of the task that they register."""


class TaskProblem(NamedTuple):
    """The reason (``problem``) why a task cannot be used. ``unknown`` is True if the task could not
    be checked on this machine; it may exist on the machine that trains. ``suggestion`` is the most
    similar name of an existing task, as a suggestion.
    """

    problem: str
    unknown: bool = False
    suggestion: str | None = None


def find_task_problem(
    adapter: str, task: str, python: str | None, folder: Path
) -> TaskProblem | None:
    """Return why the task ``task`` cannot be used. Return None if the task exists, or if this
    cannot be determined.

    The task's module is searched for in ``folder`` (the folder of the run file), and in the
    packages of the environment's interpreter ``python`` (None: the current interpreter).
    """
    path = None if python is None else [str(place) for place in site_packages(python)]
    if adapter == "reasoning_gym":
        return _reasoning_gym_problem(task, path)
    module = task_module(adapter, task) or ""
    if adapter == "verifiers":
        if module_file(f"{_BUILT_IN_PACKAGE}.{module}", folder, path) is not None:
            return None
        facts = find_name(module, "__all__", folder, path)
        note = ", by which verifiers finds the Taskset class of a module"
    else:
        facts, note = find_name(module, task.partition(":")[2], folder, path), ""
    return _module_problem(facts, module, python, note)


def _module_problem(
    facts: FunctionFacts, module: str, python: str | None, note: str
) -> TaskProblem | None:
    if facts.problem is None:
        return None
    if facts.unknown and python is not None:
        return TaskProblem(
            f"module {module} is neither next to the run file nor installed for {python}", True
        )
    return TaskProblem(facts.problem + ("" if facts.unknown else note), facts.unknown)


def _reasoning_gym_problem(task: str, path: Sequence[str] | None) -> TaskProblem | None:
    names = task_names(path)
    if not names or task in names:
        return None
    return TaskProblem(
        f"the installed reasoning_gym has no task {task}", suggestion=nearest(task, names)
    )


def task_names(path: Sequence[str] | None = None) -> set[str]:
    """Return the names of the tasks in the installed reasoning-gym package, as its source code
    defines them. The set is empty if reasoning-gym is not installed. ``path`` lists the folders in
    which the package is searched for; None means the Python path of this interpreter.
    """
    package = ADAPTERS["reasoning_gym"].modules[0]
    folders = (
        [package_folder(package)] if path is None else [Path(entry) / package for entry in path]
    )
    return {
        name
        for folder in folders
        if folder is not None
        for file in folder.rglob("*.py")
        for name in _TASK_NAME.findall(file.read_text(encoding="utf-8", errors="replace"))
    }
