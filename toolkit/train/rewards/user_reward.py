"""Load a reward function of the user from ``module:name``. Only modules that the run file allows
are imported.

Importing a module runs its code, and a run file may come from a person who is not trusted.
Therefore only modules that ``runtime.allow_code`` lists are imported. Such a module is searched in
the folder of the run file first, and then on Python's path. The folder itself is not added to
``sys.path``, because a ``json.py`` in it would replace the module of the standard library.
"""

from __future__ import annotations

import inspect
import re
import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING, Any

from toolkit.base import did_you_mean
from toolkit.base.errors import ConfigError
from toolkit.config.code import is_allowed
from toolkit.config.reward_table import PASSED_BY_TRL

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from pathlib import Path
    from types import ModuleType

_FUNCTION_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def load_function(name: str, allow_code: Sequence[str], folder: Path) -> Callable[..., Any]:
    """The reward function at ``module:name``.

    Raises ConfigError as ``load_code`` does, or if the function does not accept the keyword
    arguments that TRL passes.
    """
    function = load_code(name, allow_code, folder)
    check_signature(name, function)
    return function


def load_code(
    name: str, allow_code: Sequence[str], folder: Path, *, noun: str = "reward"
) -> Callable[..., Any]:
    """Import and return the callable ``name`` (``module:function``). ``folder`` is the folder of
    the run file. ``noun`` is the noun for the callable in error messages.

    Raises ConfigError if the name is malformed, the module is not allowed or cannot be imported, or
    the callable does not exist.
    """
    if not _FUNCTION_NAME.fullmatch(name):
        raise ConfigError(f"{noun} {name!r} must have the form module:function")
    module_name, _, attribute = name.partition(":")
    if not is_allowed(module_name, allow_code):
        raise ConfigError(
            f"{noun} {name} runs code from a module that runtime.allow_code does not list",
            fix=(
                "if you trust the module, add it to the list "
                f"`runtime.allow_code: [{module_name.partition('.')[0]}]`"
            ),
        )
    make_importable(folder, allow_code)
    module = _import(f"{noun} {name}", module_name, folder)
    function = getattr(module, attribute, None)
    if not callable(function):
        raise _missing_function_error(f"{noun} {name}", module, attribute)
    return function  # type: ignore[no-any-return]  # after callable(), its type is still Any


def missing_columns(function: Callable[..., Any], provided: set[str]) -> list[str]:
    """Return the names of the required parameters of ``function`` that get no argument, because TRL
    does not pass them and they are not in ``provided`` (the names of dataset columns and options).
    """
    return [
        parameter.name
        for parameter in _parameters(function)
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and parameter.default is parameter.empty
        and parameter.name not in PASSED_BY_TRL | provided
    ]


class RunFolderFinder(MetaPathFinder):
    """An import finder that finds one allowed top-level module in the folder of the run file."""

    def __init__(self, folder: Path, top_module: str) -> None:
        self.folder, self.top_module = folder, top_module

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,  # noqa: ARG002 - importlib's signature
    ) -> ModuleSpec | None:
        """Return the spec of the allowed module, and None for every other module. This method is
        part of importlib's protocol.
        """
        if path is not None or fullname != self.top_module:
            return None
        return PathFinder.find_spec(fullname, [str(self.folder)])


def make_importable(folder: Path, allow_code: Sequence[str]) -> None:
    """Make the modules in ``allow_code`` importable from ``folder``, the folder of the run file."""
    for allowed in allow_code:
        _add_finder(folder, allowed.partition(".")[0])


def _add_finder(folder: Path, top_module: str) -> None:
    """Make ``import top_module`` search ``folder`` first, unless the standard library has this
    module.
    """
    is_registered = any(
        isinstance(finder, RunFolderFinder)
        and (finder.folder, finder.top_module) == (folder, top_module)
        for finder in sys.meta_path
    )
    if not is_registered and top_module not in sys.stdlib_module_names:
        sys.meta_path.insert(0, RunFolderFinder(folder, top_module))


def _import(label: str, module_name: str, folder: Path) -> ModuleType:
    try:
        return import_module(module_name)
    except ModuleNotFoundError as error:
        if (folder / module_name).is_file():
            raise ConfigError(
                f"{label}: {module_name} is a file, and not the name of a module",
                where=str(folder),
                fix=f"write {module_name.removesuffix('.py')} without .py",
            ) from error
        if error.name and module_name.startswith(error.name):
            raise ConfigError(
                f"{label}: the module {error.name} does not exist",
                where=str(folder),
                fix=(
                    f"put {error.name.replace('.', '/')}.py next to the run file, or install the "
                    "module"
                ),
            ) from error
        raise ConfigError(
            (
                f"{label}: importing {module_name} needs the module {error.name}, which was not "
                "found"
            ),
            fix=f"install the module {error.name}. If it is next to the run file, allow it with "
            f"`runtime.allow_code: [{module_name.partition('.')[0]}, {error.name}]`",
        ) from error
    except SyntaxError as error:
        raise ConfigError(
            f"{label}: {error.msg}", where=f"{error.filename}:{error.lineno}"
        ) from error
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"{label}: importing {module_name} raised {type(error).__name__}: {error}"
        ) from error


def _missing_function_error(label: str, module: ModuleType, attribute: str) -> ConfigError:
    functions = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
    suggestions = did_you_mean.similar_words(attribute, functions, cutoff=0.6)
    problem = "is not a function" if hasattr(module, attribute) else "does not exist"
    return ConfigError(
        f"{label}: {attribute} {problem} in {module.__name__}",
        where=module.__file__,
        fix=f"did you mean {suggestions[0]}?"
        if suggestions
        else f"name one of the module's functions: {', '.join(sorted(functions))}"
        if functions
        else "define the function in the module",
    )


def check_signature(name: str, function: Callable[..., Any]) -> None:
    """Check that TRL can call ``function`` as a reward. TRL passes all arguments by keyword, also
    every column of the dataset.

    Raises:
        ConfigError: the function does not accept every keyword argument.
    """
    parameters = _parameters(function)
    if not parameters:
        return
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]
    if positional or not any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise ConfigError(
            f"reward {name} has the parameters ({', '.join(str(p) for p in parameters)}). But it "
            "is called by keyword with prompts, completions, completion_ids and every dataset "
            "column",
            fix="add **kwargs at the end of the parameters of the function",
        )


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except ValueError:  # some C functions have no signature
        return []
