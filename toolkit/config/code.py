"""Find the function or class that a user names as ``module:name``, and read its source. The module
is never imported, because importing would run its code.
"""

from __future__ import annotations

import ast
import re
import sys
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.base.did_you_mean import nearest
from toolkit.base.errors import InputError
from toolkit.base.files import read_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

MAX_SOURCE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class FunctionFacts:
    """A function as its source code defines it. ``parameters`` is None if the parameters cannot be
    read from the source, for example if the function has a decorator or is defined by an
    assignment.
    """

    name: str
    problem: str | None = None
    # True: the function could not be checked on this machine, so it may still be valid.
    unknown: bool = False
    parameters: tuple[str, ...] | None = None
    required: tuple[str, ...] = ()
    accepts_any_keyword: bool = False
    # What the source lacks for a description of the function as a tool.
    missing_description: str | None = None

    @property
    def signature(self) -> str:
        """The function's name and parameters as text, for messages."""
        return f"{self.name}({', '.join(self.parameters or ())})"


def is_allowed(module: str, allow_code: Iterable[str]) -> bool:
    """Whether ``runtime.allow_code`` names ``module`` or a package that contains it."""
    return any(module == allowed or module.startswith(f"{allowed}.") for allowed in allow_code)


def find_function(module: str, name: str, folder: Path) -> FunctionFacts:
    """Return what the source code of ``module`` says about the function ``name``. The module is
    searched for in ``folder`` (the folder of the run file), then on the Python path.
    """
    parsed = _parse_module(module, name, folder)
    return (
        parsed if isinstance(parsed, FunctionFacts) else _function_facts(parsed[0], name, parsed[1])
    )


def find_name(
    module: str, name: str, folder: Path, path: Sequence[str] | None = None
) -> FunctionFacts:
    """Look for ``name`` in the source code of ``module``. ``name`` can be any name that the module
    defines or imports, such as a class or ``__all__``. If the name was not found, the ``problem``
    of the result says why. ``path`` is the Python path to search. If ``path`` is None, the Python
    path of this interpreter is searched.
    """
    parsed = _parse_module(module, name, folder, path)
    if isinstance(parsed, FunctionFacts):
        return parsed
    tree, file = parsed
    functions, others = _defined_names(tree)
    names = {*functions, *others}
    if {name, "*"} & names:
        return FunctionFacts(name)
    suggestion = nearest(name, names)
    hint = f" (did you mean {suggestion}?)" if suggestion else ""
    return FunctionFacts(name, f"{file} does not define {name}{hint}")


def _parse_module(
    module: str, name: str, folder: Path, path: Sequence[str] | None = None
) -> FunctionFacts | tuple[ast.Module, Path]:
    """Return the syntax tree of ``module`` and the path of its file. If there is no syntax tree,
    return a ``FunctionFacts`` with the reason.
    """
    file = module_file(module, folder, path)
    if file is None and (folder / module).is_file():
        return FunctionFacts(
            name,
            f"{module} is a file; write the module's name, {module.removesuffix('.py')}:{name}",
        )
    if file is None:
        return FunctionFacts(
            name,
            f"module {module} is neither next to the run file nor on the Python path",
            unknown=True,
        )
    if file.suffix != ".py":
        return FunctionFacts(name)
    try:
        return ast.parse(read_bytes(file, limit=MAX_SOURCE_BYTES), str(file)), file
    except InputError as error:
        return FunctionFacts(name, f"{file}: {error.message}", unknown=True)
    except SyntaxError as error:
        return FunctionFacts(name, f"{file}:{error.lineno}: {error.msg}")
    except (ValueError, RecursionError, MemoryError) as error:
        return FunctionFacts(name, f"{file} cannot be read: {error}", unknown=True)


def module_file(module: str, folder: Path, path: Sequence[str] | None = None) -> Path | None:
    """Return the file of a module by its dotted name; None if the module was not found. No package
    is imported. ``path`` is the Python path to search; None means that of this interpreter.
    """
    parts = module.split(".")
    run_folder = [] if parts[0] in sys.stdlib_module_names else [str(folder)]
    search_path = [*run_folder, *(sys.path if path is None else path)]
    file: Path | None = None
    for depth, part in enumerate(parts):
        spec = PathFinder.find_spec(
            part if depth == 0 else ".".join(parts[: depth + 1]), search_path
        )
        if spec is None:
            return None
        file = Path(spec.origin) if spec.origin and spec.has_location else None
        search_path = list(spec.submodule_search_locations or [])
    return file


def _defined_names(
    tree: ast.Module,
) -> tuple[dict[str, ast.FunctionDef | ast.AsyncFunctionDef], set[str]]:
    """Return the functions at the top level of a module by name, and the set of all other names
    that the module may define.
    """
    functions: dict[str, ast.FunctionDef | ast.AsyncFunctionDef] = {}
    others: set[str] = set()
    for statement in ast.walk(tree):
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if statement in tree.body:
                functions[statement.name] = statement
        elif isinstance(statement, ast.ClassDef):
            others.add(statement.name)
        elif isinstance(statement, (ast.Import, ast.ImportFrom)):
            others |= {alias.asname or alias.name.partition(".")[0] for alias in statement.names}
        elif isinstance(statement, ast.Name) and isinstance(statement.ctx, ast.Store):
            others.add(statement.id)
    return functions, others


def _function_facts(tree: ast.Module, name: str, file: Path) -> FunctionFacts:
    functions, others = _defined_names(tree)
    function = functions.get(name)
    if function is None:
        if name in others or "*" in others:
            return FunctionFacts(name)
        return FunctionFacts(name, f"{file} has no function {name}")
    if function.decorator_list:
        return FunctionFacts(name)  # the effect of a decorator cannot be read from the source
    return _signature_facts(function)


def _signature_facts(function: ast.FunctionDef | ast.AsyncFunctionDef) -> FunctionFacts:
    arguments = function.args
    positional = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    keyword = [argument.arg for argument in arguments.kwonlyargs]
    required = positional[: len(positional) - len(arguments.defaults)]
    required += [
        argument
        for argument, value in zip(keyword, arguments.kw_defaults, strict=True)
        if value is None
    ]
    star = [f"*{arguments.vararg.arg}"] if arguments.vararg else []
    stars = [f"**{arguments.kwarg.arg}"] if arguments.kwarg else []
    return FunctionFacts(
        function.name,
        parameters=(*positional, *star, *keyword, *stars),
        required=tuple(required),
        accepts_any_keyword=arguments.kwarg is not None and not arguments.posonlyargs,
        missing_description=_missing_description(function),
    )


def _missing_description(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str | None:
    """Return what the function lacks for a description that a model reads (transformers'
    ``get_json_schema``): a docstring, a type hint, or a line on an argument in the docstring. None
    if it lacks nothing.
    """
    docstring = ast.get_docstring(function)
    if docstring is None:
        return "has no docstring"
    given = function.args
    arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    for argument in (*arguments, given.vararg, given.kwarg):
        if argument is not None and argument.annotation is None:
            return f"has no type hint for its argument {argument.arg}"
    for argument in arguments:
        if not re.search(rf"^\s*{argument.arg}\s*:", docstring, re.MULTILINE):
            return f"has no line in its docstring for its argument {argument.arg}"
    return None
