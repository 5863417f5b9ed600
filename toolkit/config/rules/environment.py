"""Environments and tools: their code may run, and there is one source of prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.config.code import find_function, is_allowed
from toolkit.config.finding import Fix, Severity
from toolkit.config.rules.violation import RuleViolation, rule
from toolkit.config.trl_names import ENVIRONMENT_ADAPTERS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toolkit.config.rules.run import Run

_ADAPTER = "environment.adapter"
_TOOLS = "tools.functions"


def _used(run: Run) -> Iterator[tuple[str | tuple[str | int, ...], str]]:
    """Each adapter that the run uses: as its environment, or as a reward by its name."""
    if run.node(_ADAPTER) is not None and run.written(_ADAPTER):
        yield _ADAPTER, str(run.value(_ADAPTER))
    functions = run.node("reward.functions")
    listed = functions.value if functions is not None else None
    for index, item in enumerate(listed if isinstance(listed, list) else ()):
        name = item.value.get("name") if isinstance(item.value, dict) else None
        if name is not None and isinstance(name.value, str) and name.value in ENVIRONMENT_ADAPTERS:
            yield ("reward", "functions", index, "name"), name.value


@rule(
    "ENV001",
    f"{_ADAPTER} runtime.allow_code",
    example="environment: {adapter: reasoning_gym, task: leg_counting}",
    fix="runtime: {allow_code: [reasoning_gym]}",
)
def package_is_allowed(run: Run) -> Iterator[RuleViolation]:
    """The package of an environment is one that runtime.allow_code names.

    It makes the prompts and scores the completions, so its code runs, as that of a reward does.
    """
    allowed = run.value("runtime.allow_code")
    told = set()
    for at, name in _used(run):
        module = ENVIRONMENT_ADAPTERS[name].modules[0]
        if not is_allowed(module, allowed) and module not in told:
            told.add(module)
            yield RuleViolation(
                at,
                f"code of {module} is not allowed to run",
                notes=(run.operand("runtime.allow_code"),),
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
    """Prompts come from a data set or from an environment, not from both.

    dataset.system and dataset.chat apply to the prompts of an environment too.
    """
    if run.node("environment") is None:
        return
    for key in ("dataset.path", "dataset.eval_path"):
        if run.value(key) is not None:
            yield RuleViolation(
                key,
                "there is an environment, which makes the prompts",
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
    """A tool is module:function of a module that runtime.allow_code lets in.

    The module is looked for beside the run file and on the Python path. Its source is read; it is
    not imported. One that is not here is a warning (an error under --strict).
    """
    if run.node(_TOOLS) is None or not run.written(_TOOLS):
        return
    for index, name in enumerate(run.value(_TOOLS)):
        at = ("tools", "functions", index)
        module, _, function = name.partition(":")
        if not function.isidentifier() or not all(map(str.isidentifier, module.split("."))):
            yield RuleViolation(at, f"{name} is no module:function")
        elif not is_allowed(module, run.value("runtime.allow_code")):
            top = module.partition(".")[0]
            yield RuleViolation(
                at,
                f"code of {module} is not allowed to run",
                notes=(run.operand("runtime.allow_code"),),
                fixes=(Fix(f"runtime: {{allow_code: [{top}]}}"),),
            )
        else:
            found = find_function(module, function, run.document.source.folder)
            if found.problem:
                severity = Severity.WARNING if found.unknown else Severity.ERROR
                yield RuleViolation(at, found.problem, severity=severity, unknown=found.unknown)


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
    """Tools are called in a chat.

    A call and its result are messages of the chat template, which a plain text has no place for.
    """
    if run.node(_TOOLS) is None or run.value("dataset.chat") is not False:
        return
    yield RuleViolation(
        "dataset.chat",
        "tools are called in a chat, and the prompts are plain text",
        fixes=(Fix("chat: auto"),),
        related=(_TOOLS,),
    )
