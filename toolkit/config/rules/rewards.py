"""Rules on reward functions: at least one is set, all exist, and TRL can call them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from toolkit.base.did_you_mean import nearest
from toolkit.config.code import FunctionFacts, find_function, is_allowed
from toolkit.config.finding import Fix, Severity
from toolkit.config.message_text import show_value
from toolkit.config.reward_table import BUILTIN_OPTIONS, PASSED_BY_TRL
from toolkit.config.rules.run import SkipRule
from toolkit.config.rules.violation import RuleViolation, rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toolkit.config.document import Node
    from toolkit.config.rules.run import Run
    from toolkit.config.source import KeyPath

_FUNCTIONS = "reward.functions"
_WEIGHTS = "grpo.reward_weights"


def _function_items(run: Run) -> list[tuple[KeyPath, dict[str, Node]]]:
    """The well-formed items of reward.functions, each with its key path."""
    node = run.node(_FUNCTIONS)
    if node is None or not isinstance(node.value, list):
        return []
    items: list[tuple[KeyPath, dict[str, Node]]] = []
    for index, item in enumerate(node.value):
        path: KeyPath = ("reward", "functions", index)
        if isinstance(item.value, dict) and path not in run.invalid_paths:
            items.append((path, item.value))
    return items


def _named_functions(run: Run) -> Iterator[tuple[KeyPath, dict[str, Node], Node]]:
    for path, members in _function_items(run):
        name = members.get("name")
        if (
            name is not None
            and isinstance(name.value, str)
            and (*path, "name") not in run.invalid_paths
        ):
            yield path, members, name


@rule(
    "GRPO011",
    f"{_WEIGHTS} {_FUNCTIONS}",
    example="""
grpo:
  reward_weights: [1.0, 0.5]
reward:
  functions: [{name: exact_match}]
""",
    fix="set one weight for each function",
)
def one_weight_each(run: Run) -> Iterator[RuleViolation]:
    """Each reward function has one finite weight, and the weights are set in only one place.

    The weight is a key of its function (reward.functions[].weight). TRL's list grpo.reward_weights
    is also accepted if it has one item per function and no function has its own weight.
    """
    weights = run.value(_WEIGHTS)
    if weights is None:
        return
    functions = _function_items(run)
    weighted_path = next((path for path, members in functions if "weight" in members), None)
    if len(weights) != len(functions):
        yield RuleViolation(
            _WEIGHTS,
            f"the number of weights is {len(weights)}, but the number of reward functions is "
            f"{len(functions)}",
            notes=(run.describe(_FUNCTIONS),),
            related=(_FUNCTIONS,),
        )
    elif weighted_path is not None:
        yield RuleViolation(
            _WEIGHTS,
            "cannot be set, because a function in reward.functions has its own weight",
            notes=(f"reward.functions[{weighted_path[2]}] has the key weight",),
            fixes=(run.set_fix(_WEIGHTS, None),),
            related=(_FUNCTIONS,),
        )


@rule(
    "GRPO012",
    _FUNCTIONS,
    example="reward:\n  functions: []",
    fix="reward: {functions: [{name: exact_match}]}",
)
def has_reward(run: Run) -> Iterator[RuleViolation]:
    """There is at least one reward function.

    GRPO learns only from rewards. A run with an environment needs no reward function, because the
    environment scores the completions.
    """
    if run.node("environment") is not None:
        return
    if not run.is_set(_FUNCTIONS) or run.value(_FUNCTIONS) == []:
        yield RuleViolation(
            _FUNCTIONS,
            "there is no reward function: the run would learn nothing",
            fixes=(Fix("functions: [{name: exact_match}]"),),
            related=("reward",),
        )


@rule(
    "REWARD001",
    f"{_FUNCTIONS} runtime.allow_code",
    example="reward:\n  functions: [{name: exact_mach}]",
    fix="name: exact_match",
)
def reward_exists(run: Run) -> Iterator[RuleViolation]:
    """A reward is the name of a built-in reward, or module:function for your own function.

    runtime.allow_code must allow the module. The module is searched next to the run file and on the
    Python path. Validation reads its source and does not import it. A missing module is a warning
    (with --strict an error).
    """
    for path, _, name in _named_functions(run):
        text = name.value
        name_path = (*path, "name")
        if ":" not in text:
            if text not in BUILTIN_OPTIONS:
                yield _unknown_reward(run, name_path, name)
            continue
        module, _, function = text.partition(":")
        if not _is_module_name(module) or not function.isidentifier():
            yield RuleViolation(name_path, f"{text} must have the form module:function")
            continue
        yield from function_violations(run, name_path, module, function)


def function_violations(
    run: Run, path: KeyPath, module: str, function: str
) -> Iterator[RuleViolation]:
    """Yield a violation if runtime.allow_code does not allow ``module``, or if the source of
    ``module`` does not define the user's function ``function``. The violation is reported at the
    key ``path``.
    """
    if not _is_code_allowed(run, module):
        yield code_not_allowed(run, path, module)
        return
    result = find_function(module, function, run.document.source.folder)
    if result.problem:
        severity = Severity.WARNING if result.unknown else Severity.ERROR
        yield RuleViolation(path, result.problem, severity=severity, unknown=result.unknown)


def _unknown_reward(run: Run, path: KeyPath, name: Node) -> RuleViolation:
    suggestion = nearest(name.value, list(BUILTIN_OPTIONS))
    fixes = (run.replace_fix(name, suggestion),) if suggestion else ()
    legal_names = (
        f"built-in rewards: {', '.join(BUILTIN_OPTIONS)}; your own function: module:function"
    )
    return RuleViolation(
        path, f"there is no built-in reward {name.value}", notes=(legal_names,), fixes=fixes
    )


def _is_module_name(module: str) -> bool:
    return all(part.isidentifier() for part in module.split("."))


def code_not_allowed(
    run: Run, path: str | KeyPath, module: str, *more_packages: str, related: tuple[str, ...] = ()
) -> RuleViolation:
    """Return the violation for a ``module`` of the user that runtime.allow_code does not contain.
    ``more_packages`` are packages that must be in the list too.
    """
    packages = ", ".join((*more_packages, module.partition(".")[0]))
    return RuleViolation(
        path,
        f"runtime.allow_code does not allow code of {module} to run",
        notes=(run.describe("runtime.allow_code"),),
        fixes=(Fix(f"runtime: {{allow_code: [{packages}]}}"),),
        related=related,
    )


def _is_code_allowed(run: Run, module: str) -> bool:
    return is_allowed(module, run.value("runtime.allow_code"))


def _read_function(run: Run, name: Node) -> FunctionFacts | None:
    """The parameters of a user's function, read from its source; None if its module is not allowed
    or not on this machine.
    """
    module, colon, function = str(name.value).partition(":")
    if not colon or not _is_module_name(module) or not _is_code_allowed(run, module):
        return None
    result = find_function(module, function, run.document.source.folder)
    return None if result.problem else result


@rule(
    "REWARD002",
    f"{_FUNCTIONS} dataset.answer",
    example="reward:\n  functions: [{name: 'my_pkg.rewards:tone'}]  # def tone(text): ...",
    fix="write def tone(prompts, completions, **columns)",
)
def reward_can_be_called(run: Run) -> Iterator[RuleViolation]:
    """A reward function takes (prompts, completions, **columns).

    TRL calls the function with keyword arguments: prompts, completions, completion_ids,
    trainer_state and others, and one argument for every other column of the dataset. The function
    must accept all of them. An argument that the function requires must be one of these arguments
    or an option of the function.
    """
    for path, members, name in _named_functions(run):
        function = _read_function(run, name)
        if function is None or function.parameters is None:
            continue
        name_path = (*path, "name")
        options = members["options"].value if "options" in members else {}
        columns = _columns(run)
        if not function.accepts_any_keyword:
            yield RuleViolation(
                name_path,
                f"{function.signature} does not accept **columns, but TRL passes more arguments "
                "than the function has parameters",
                fixes=(Fix(f"write def {function.name}(prompts, completions, **columns)"),),
            )
            continue
        for parameter in function.required:
            if parameter in PASSED_BY_TRL or parameter in options:
                continue
            if columns is None or parameter in columns or parameter == "answer":
                continue
            yield RuleViolation(
                name_path,
                f"{function.signature} requires the argument {parameter}, but no column or option "
                "has this name",
                notes=(f"columns: {', '.join(sorted(columns))}",),
            )


def _columns(run: Run) -> set[str] | None:
    from toolkit.config.data_facts import read_data_facts  # noqa: PLC0415 - only this rule reads the data

    data = read_data_facts(run.document, "path")
    return set(data.columns) if data is not None and data.columns is not None else None


@rule(
    "REWARD003",
    _FUNCTIONS,
    example="reward:\n  functions: [{name: regex_match, options: {patern: 'a+'}}]",
    fix="options: {pattern: 'a+'}",
)
def options_are_known(run: Run) -> Iterator[RuleViolation]:
    """A built-in reward gets only options that it has, and all options that it requires.

    If the reward is your own function, the options are passed to the function as keyword arguments.
    The option pattern of regex_match must be a regular expression of Python.
    """
    for path, members, name in _named_functions(run):
        option_table = BUILTIN_OPTIONS.get(name.value)
        options_node = members.get("options")
        if option_table is None:
            continue
        options: dict[str, Any] = options_node.value if options_node is not None else {}
        if not isinstance(options, dict):
            raise SkipRule
        for option, node in options.items():
            if option in option_table or option.startswith("\0"):
                continue
            suggestion = nearest(option, list(option_table))
            yield RuleViolation(
                (*path, "options", option),
                f"{name.value} has no option {option}",
                notes=(f"its options: {', '.join(option_table) or 'none'}",),
                fixes=(run.rename_fix(node, suggestion),) if suggestion else (),
                on_key=True,
            )
        for option, is_required in option_table.items():
            if is_required and option not in options:
                yield RuleViolation((*path, "name"), f"{name.value} needs the option {option}")
        if "pattern" in options and "pattern" in option_table:
            yield from _pattern_violations(path, options["pattern"].value)


def _pattern_violations(path: KeyPath, pattern: object) -> Iterator[RuleViolation]:
    if not isinstance(pattern, str):
        return
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        yield RuleViolation(
            (*path, "options", "pattern"),
            f"{show_value(pattern)} is not a valid regular expression: {error}",
        )


@rule(
    "REWARD004",
    f"reward.isolate reward.timeout_s {_FUNCTIONS}",
    example="""
reward:
  functions: [{name: 'my_pkg.rewards:tone'}]
  isolate: false
  timeout_s: null
""",
    fix="timeout_s: 600",
    severity=Severity.WARNING,
)
def in_process_rewards_have_timeout(run: Run) -> Iterator[RuleViolation]:
    """A reward function that runs in the training process has a time limit.

    With reward.isolate: true the function runs in a process of its own, so a signal such as SIGTERM
    can end a run whose function hangs. With reward.isolate: false the signal raises an exception
    that the function may catch. Then only the time limit stops the function.
    """
    if run.value("reward.isolate") is not False or run.value("reward.timeout_s") is not None:
        return
    if any(":" in name.value for *_, name in _named_functions(run)):
        yield RuleViolation(
            "reward.timeout_s",
            "without a time limit, nothing stops a reward function that hangs",
            notes=("reward.isolate is false: the function runs in the training process",),
            fixes=(run.set_fix("reward.timeout_s", 600),),
            related=("reward.isolate",),
        )
