"""A reward function of the user's, by ``module:name``: only from modules that the run file allows.

Importing a module runs it. So a run file from someone else must not be able to import what its
reader has not named in ``runtime.allow_code``. An allowed top-level name is looked for beside the
run file first and then where Python looks; the folder itself never goes on ``sys.path``, where a
``json.py`` in it would be run instead of the real one.
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

_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def load_function(name: str, allow_code: Sequence[str], folder: Path) -> Callable[..., Any]:
    """The reward at ``module:name``: ``load_code``'s, which TRL can call as it calls a reward.
    Raises ConfigError.
    """
    function = load_code(name, allow_code, folder)
    check_signature(name, function)
    return function


def load_code(
    name: str, allow_code: Sequence[str], folder: Path, *, what: str = "reward"
) -> Callable[..., Any]:
    """The callable at ``module:name``; ``folder`` is the run file's, ``what`` is said in errors.

    Raises ConfigError where the name is malformed, the module is not allowed, cannot be imported
    (whatever its code raises), or has no such callable.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{what} {name!r} is not of the form module:function")
    module_name, _, attribute = name.partition(":")
    if not is_allowed(module_name, allow_code):
        raise ConfigError(
            f"{what} {name} is code, and runtime.allow_code does not allow its module",
            fix=f"runtime: {{allow_code: [{module_name.partition('.')[0]}]}}, if you trust it",
        )
    for allowed in allow_code:
        _look_in(folder, allowed.partition(".")[0])
    module = _import(f"{what} {name}", module_name, folder)
    function = getattr(module, attribute, None)
    if not callable(function):
        raise _no_function(f"{what} {name}", module, attribute)
    return function  # type: ignore[no-any-return]  # callable() narrows Any no further


def missing_columns(function: Callable[..., Any], there: set[str]) -> list[str]:
    """Parameters without a default that neither TRL nor a column named in ``there`` fills."""
    return [
        parameter.name
        for parameter in _parameters(function)
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and parameter.default is parameter.empty
        and parameter.name not in PASSED_BY_TRL | there
    ]


class BesideRunFile(MetaPathFinder):
    """Finds one allowed top-level module in the run file's folder, and nothing else there."""

    def __init__(self, folder: Path, top: str) -> None:
        self.folder, self.top = folder, top

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,  # noqa: ARG002 - importlib's signature
    ) -> ModuleSpec | None:
        """importlib's: None hands the question on to the next finder."""
        if path is not None or fullname != self.top:
            return None
        return PathFinder.find_spec(fullname, [str(self.folder)])


def _look_in(folder: Path, top: str) -> None:
    """Have ``import top`` look in ``folder`` first; never for a name of the standard library."""
    known = any(
        isinstance(finder, BesideRunFile) and (finder.folder, finder.top) == (folder, top)
        for finder in sys.meta_path
    )
    if not known and top not in sys.stdlib_module_names:
        sys.meta_path.insert(0, BesideRunFile(folder, top))


def _import(name: str, module_name: str, folder: Path) -> ModuleType:
    try:
        return import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and module_name.startswith(error.name):
            raise ConfigError(
                f"{name}: there is no module {error.name}",
                where=str(folder),
                fix=f"put {error.name.replace('.', '/')}.py beside the run file, or install it",
            ) from error
        raise ConfigError(
            f"{name}: importing {module_name} needs the module {error.name}, not found",
            fix=f"install it; if it lies beside the run file, allow it too: allow_code: "
            f"[{module_name.partition('.')[0]}, {error.name}]",
        ) from error
    except SyntaxError as error:
        raise ConfigError(
            f"{name}: {error.msg}", where=f"{error.filename}:{error.lineno}"
        ) from error
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"{name}: importing {module_name} raised {type(error).__name__}: {error}"
        ) from error


def _no_function(name: str, module: ModuleType, attribute: str) -> ConfigError:
    there = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
    near = did_you_mean.near(attribute, there, cutoff=0.6)
    what = "is not a function" if hasattr(module, attribute) else "does not exist"
    return ConfigError(
        f"{name}: {attribute} {what} in {module.__name__}",
        where=module.__file__,
        fix=f"did you mean {near[0]}?" if near else f"it has: {', '.join(sorted(there)) or 'none'}",
    )


def check_signature(name: str, function: Callable[..., Any]) -> None:
    """Refuse a function that cannot be called as TRL calls a reward.

    Raises:
        ConfigError: it does not take every keyword.
    """
    parameters = _parameters(function)
    if not parameters:
        return
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]
    if positional or not any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise ConfigError(
            f"reward {name} takes ({', '.join(str(p) for p in parameters)}); it is called by "
            "keyword with prompts, completions, completion_ids and every dataset column",
            fix="end its parameters with **kwargs",
        )


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except ValueError:  # some C functions have none to show
        return []
