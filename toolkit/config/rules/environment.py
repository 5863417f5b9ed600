"""Rules on environments and tools. runtime.allow_code must allow their code, and all prompts must
come from one source.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.config.code import find_function, is_allowed
from toolkit.config.environment_tasks import find_task_problem
from toolkit.config.environments import (
    ADAPTERS,
    MULTI_TURN_ADAPTERS,
    is_interpreter,
    missing_package,
    pip_command,
    task_module,
)
from toolkit.config.finding import Fix, Severity
from toolkit.config.rules.rewards import code_not_allowed, function_violations
from toolkit.config.rules.violation import RuleViolation, rule
from toolkit.config.run_paths import local_path

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toolkit.config.document import Node
    from toolkit.config.environment_tasks import TaskProblem
    from toolkit.config.rules.run import Run

_ADAPTER = "environment.adapter"
_TASK = "environment.task"
_PYTHON = "environment.python"
_TOOLS = "tools.functions"


def _used_adapters(run: Run) -> Iterator[tuple[str | tuple[str | int, ...], str]]:
    """Yield the key path and the name of each environment adapter that the run uses. An adapter
    connects the run to a package such as reasoning_gym, as the environment or as a reward.
    """
    if run.node(_ADAPTER) is not None and run.is_set(_ADAPTER):
        yield _ADAPTER, str(run.value(_ADAPTER))
    functions = run.node("reward.functions")
    items = functions.value if functions is not None else None
    for index, item in enumerate(items if isinstance(items, list) else ()):
        name = item.value.get("name") if isinstance(item.value, dict) else None
        if name is not None and isinstance(name.value, str) and name.value in ADAPTERS:
            yield ("reward", "functions", index, "name"), name.value


@rule(
    "ENV001",
    f"{_ADAPTER} runtime.allow_code",
    example="environment: {adapter: reasoning_gym, task: leg_counting}",
    fix="runtime: {allow_code: [reasoning_gym]}",
)
def package_is_allowed(run: Run) -> Iterator[RuleViolation]:
    """The list runtime.allow_code contains the package of the environment.

    The package makes the prompts and scores the completions, so its code runs during training, like
    the code of a reward function.
    """
    allowed = run.value("runtime.allow_code")
    reported_modules = set()
    for path, name in _used_adapters(run):
        module = ADAPTERS[name].modules[0]
        if not is_allowed(module, allowed) and module not in reported_modules:
            reported_modules.add(module)
            yield RuleViolation(
                path,
                f"runtime.allow_code does not allow code of {module} to run",
                notes=(run.describe("runtime.allow_code"),),
                fixes=(Fix(f"runtime: {{allow_code: [{module}]}}"),),
            )


@rule(
    "ENV002",
    "environment dataset.path dataset.eval_path",
    example="""
dataset: {path: train.jsonl}
environment: {adapter: reasoning_gym, task: leg_counting}
""",
    fix="remove dataset.path, or the section environment",
)
def one_source_of_prompts(run: Run) -> Iterator[RuleViolation]:
    """Prompts come from a dataset or from an environment, not from both.

    dataset.system and dataset.chat apply to the prompts of an environment too.
    """
    if run.node("environment") is None:
        return
    for key in ("dataset.path", "dataset.eval_path"):
        if run.value(key) is not None:
            yield RuleViolation(
                key,
                "cannot be set together with an environment, which makes the prompts itself",
                fixes=(Fix(f"remove {key}, or the section environment"),),
                related=("environment",),
            )


@rule(
    "ENV003",
    f"{_TOOLS} runtime.allow_code",
    example="tools: {functions: [my_tools]}",
    fix="tools: {functions: [my_tools:search]}",
)
def tools_exist(run: Run) -> Iterator[RuleViolation]:
    """A tool has the form module:function, and runtime.allow_code allows the module.

    The function needs type hints, and a docstring with a line for each argument (section `Args:`).
    The model reads them. The module is searched next to the run file and on the Python path.
    Validation reads its source and does not import it. A missing module is a warning (with --strict
    an error).
    """
    if run.node(_TOOLS) is None or not run.is_set(_TOOLS):
        return
    for index, name in enumerate(run.value(_TOOLS)):
        path = ("tools", "functions", index)
        module, _, function = name.partition(":")
        if not function.isidentifier() or not all(map(str.isidentifier, module.split("."))):
            yield RuleViolation(path, f"{name} must have the form module:function")
        else:
            violations = list(function_violations(run, path, module, function))
            yield from violations or _description_violations(run, path, module, function)


def _description_violations(
    run: Run, path: tuple[str | int, ...], module: str, function: str
) -> Iterator[RuleViolation]:
    missing = find_function(module, function, run.document.source.folder).missing_description
    if missing is not None:
        yield RuleViolation(
            path,
            f"{function} {missing}: the model reads a tool's description from its type hints and "
            "its docstring",
            fixes=(
                Fix(
                    "add type hints to the function, and a docstring with a line "
                    "`name: description` for each argument (section `Args:`)"
                ),
            ),
        )


@rule(
    "ENV004",
    f"{_TOOLS} dataset.chat",
    example="""
tools: {functions: [my_tools:search]}
dataset: {chat: false}
""",
    fix="dataset: {chat: true}",
)
def tools_need_a_chat(run: Run) -> Iterator[RuleViolation]:
    """Tools need prompts that are chats.

    A tool call and its result are messages of a chat. Only a chat template can turn such messages
    into text.
    """
    if run.node(_TOOLS) is None or run.value("dataset.chat") is not False:
        return
    yield RuleViolation(
        "dataset.chat",
        "tools can be called only in a chat, but the prompts are plain text",
        fixes=(Fix("chat: auto"),),
        related=(_TOOLS,),
    )


def _adapter_name(run: Run) -> str | None:
    node = run.node(_ADAPTER)
    return node.value if node is not None and node.value in ADAPTERS else None


def _interpreter(run: Run) -> str | None:
    node = run.node(_PYTHON)
    has_value = node is not None and isinstance(node.value, str) and run.is_set(_PYTHON)
    return str(local_path("python", node)) if node is not None and has_value else None


@rule(
    "ENV005",
    f"{_ADAPTER} {_PYTHON}",
    example="environment: {adapter: openenv, task: my_game:Game}  # and openenv is not installed",
    fix="pip install 'openenv>=0.10'",
    severity=Severity.WARNING,
)
def package_is_installed(run: Run) -> Iterator[RuleViolation]:
    """The package of an environment is installed for the Python interpreter that the environment
    uses.

    A missing package is a warning, because the run may be meant for another machine (with --strict
    it is an error). Training stops before the engine starts if the package is missing. OpenEnv and
    vLLM need different releases of the package mcp. So install OpenEnv into a virtual environment
    of its own, and set environment.python to the Python interpreter of that virtual environment.
    """
    adapter, python = _adapter_name(run), _interpreter(run)
    missing = None if adapter is None else missing_package(adapter, python)
    if missing is not None:
        location = f" for {python}" if python else " here"
        yield RuleViolation(
            _ADAPTER,
            f"{adapter} needs the package {missing.modules[0]}, which is not installed{location}",
            fixes=(Fix(pip_command(missing, python)),),
            related=(_PYTHON,) if python else (),
            unknown=True,
        )


@rule(
    "ENV006",
    f"{_TASK} runtime.allow_code",
    example="environment: {adapter: openenv, task: my_game}",
    fix="environment: {adapter: openenv, task: my_game:Game}",
)
def task_is_allowed_code(run: Run) -> Iterator[RuleViolation]:
    """environment.task has the form that the adapter (environment.adapter) requires. If the task is
    code in your own module, the list runtime.allow_code contains this module.

    For the adapter verifiers, the task is the id of a taskset. The verifiers library imports the
    module that has this id as its name. For the adapter openenv, the task has the form
    module:Class.
    """
    adapter, node = _adapter_name(run), run.node(_TASK)
    if adapter is None or node is None or not isinstance(node.value, str):
        return
    if (violation := _unreadable_task_violation(run, adapter, node.value)) is not None:
        yield violation


@rule(
    "ENV007",
    "environment dataset.chat grpo.eval_strategy",
    example="environment: {adapter: openenv, task: my_game:Game, eval_size: 10}",
    fix="remove environment.eval_size",
)
def steps_exclude_evaluation(run: Run) -> Iterator[RuleViolation]:
    """An environment with several turns cannot be used for evaluation, and needs prompts that are
    chats.

    An evaluation asks for one answer to each prompt. The model takes no steps in the environment,
    so there would be nothing to score. In training the model takes a step by a tool call, and a
    tool call is a message of a chat.
    """
    if _adapter_name(run) not in MULTI_TURN_ADAPTERS:
        return
    if run.value("environment.eval_size") is not None:
        yield RuleViolation(
            "environment.eval_size",
            "an evaluation takes no steps in the environment, so there is nothing to score",
            fixes=(run.set_fix("environment.eval_size", None),),
            related=(_ADAPTER,),
        )
    if run.value("dataset.chat") is False:
        yield RuleViolation(
            "dataset.chat",
            "cannot be false, because the model acts by tool calls, which are messages of a chat",
            fixes=(Fix("chat: auto"),),
            related=(_ADAPTER,),
        )


@rule(
    "ENV008",
    _PYTHON,
    example="environment: {adapter: openenv, task: my_game:Game, python: nowhere/python}",
    fix="python: openenv-venv/bin/python",
    severity=Severity.WARNING,
)
def interpreter_exists(run: Run) -> Iterator[RuleViolation]:
    """environment.python, the Python interpreter of the environment, is an executable file.

    A missing interpreter is a warning, because the run may be meant for another machine (with
    --strict it is an error).
    """
    python = _interpreter(run)
    if python is not None and not is_interpreter(python):
        yield RuleViolation(
            _PYTHON,
            f"{python} is not an executable file",
            fixes=(
                Fix(
                    "run `python -m venv openenv-venv`, and set environment.python to "
                    "openenv-venv/bin/python"
                ),
            ),
            unknown=True,
        )


def _task_nodes(run: Run) -> Iterator[tuple[str | tuple[str | int, ...], str, Node]]:
    """Yield (key path, environment adapter, task) for the task of the environment, and for the task
    of each reward that an environment computes.
    """
    adapter, node = _adapter_name(run), run.node(_TASK)
    if adapter is not None and node is not None and run.is_set(_TASK):
        yield _TASK, adapter, node
    functions = run.node("reward.functions")
    for path, name in _used_adapters(run):
        if not isinstance(path, str) and functions is not None:
            options = functions.value[path[2]].value.get("options")
            if options is not None and isinstance(options.value, dict) and "task" in options.value:
                yield (*path[:3], "options", "task"), name, options.value["task"]


@rule(
    "ENV009",
    f"{_TASK} {_PYTHON}",
    example="environment: {adapter: reasoning_gym, task: leg_countin}",
    fix="environment: {adapter: reasoning_gym, task: leg_counting}",
)
def task_exists(run: Run) -> Iterator[RuleViolation]:
    """The task of an environment exists.

    With adapter: reasoning_gym, the tasks are read from the source of the installed package. With
    verifiers, the task is a module with the list __all__. With openenv, the task is a class in a
    module. The module is searched next to the run file and among the packages of the environment's
    Python interpreter. Validation reads the module's source and does not import it. A missing
    module is a warning, because the run may be meant for another machine (with --strict it is an
    error). Only training can find out whether the module makes usable problems. Training imports
    the module before it loads the model.
    """
    python = _interpreter(run)
    if python is not None and not is_interpreter(python):
        return  # ENV008
    for path, adapter, node in _task_nodes(run):
        task = node.value
        if not isinstance(task, str) or _unreadable_task_violation(run, adapter, task) is not None:
            continue
        missing = find_task_problem(adapter, task, python, run.document.source.folder)
        if missing is not None:
            yield RuleViolation(
                path,
                missing.problem,
                fixes=_task_fixes(run, node, missing),
                related=(_PYTHON,) if python else (),
                severity=Severity.WARNING if missing.unknown else Severity.ERROR,
                unknown=missing.unknown,
            )


def _task_fixes(run: Run, node: Node, missing: TaskProblem) -> tuple[Fix, ...]:
    if missing.suggestion is not None:
        return (run.replace_fix(node, missing.suggestion),)
    if missing.unknown:
        return (Fix("put the module next to the run file, or install its package"),)
    return ()


def _unreadable_task_violation(run: Run, adapter: str, task: str) -> RuleViolation | None:
    """Return a violation if validation must not read the source of a task, else None. The source
    must not be read if the task has the wrong form or if runtime.allow_code does not allow its
    module.
    """
    module = task_module(adapter, task)
    if module is None:
        return None
    if not all(map(str.isidentifier, module.split("."))):
        return RuleViolation(_TASK, f"{task} does not name a Python module")
    if adapter in MULTI_TURN_ADAPTERS and not task.partition(":")[2].isidentifier():
        return RuleViolation(_TASK, f"{task} must have the form module:Class")
    if is_allowed(module, run.value("runtime.allow_code")):
        return None
    package, key = ADAPTERS[adapter].modules[0], "runtime.allow_code"
    return code_not_allowed(run, _TASK, module, package, related=(key,))
