"""Rules on ``grpo.generation_kwargs``: whether the run's engine accepts each sampling keyword and
its value, and whether training can apply the keyword too.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from toolkit.config.finding import Fix, Severity
from toolkit.config.rules.keys import is_multi_turn
from toolkit.config.rules.violation import RuleViolation, rule
from toolkit.config.sampling_keywords import (
    ENGINE_NAMES,
    describe_mismatch,
    find_problem,
    unreproduced_keywords,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from toolkit.config.document import Node
    from toolkit.config.rules.run import Run
    from toolkit.config.sampling_keywords import Engine, Problem

_KWARGS = "grpo.generation_kwargs"
_REGEX = "grpo.vllm_structured_outputs_regex"
_SYNTAX_ERRORS = ("missing )", "unbalanced", "unterminated", "nothing to repeat")
_UNSUPPORTED_SYNTAX = re.compile(r"(?<!\\)\(\?<?[=!]|\\[1-9]|\(\?P=")
_KEYS = f"{_KWARGS} runtime.engine model.fast_inference"


def _valid_keywords(run: Run) -> Mapping[str, Node]:
    """The keywords of generation_kwargs in the run file, except those whose value another rule
    reports as invalid.
    """
    node = run.node(_KWARGS)
    if node is None or not isinstance(node.value, dict) or not run.is_set(_KWARGS):
        return {}
    prefix = tuple(_KWARGS.split("."))
    invalid_names = {path[2] for path in run.invalid_paths if path[:2] == prefix and len(path) > 2}
    return {
        name: value_node
        for name, value_node in node.value.items()
        if name not in invalid_names
        and all(_is_finite(descendant.value) for _, descendant in value_node.walk(()))
    }


def _is_finite(value: object) -> bool:
    """Whether a value is neither NaN nor infinity. Rule DOC006 reports NaN and infinity."""
    return not isinstance(value, float) or math.isfinite(value)


def _possible_engines(run: Run) -> tuple[Engine, ...]:
    """Return the engines that may generate the completions. Usually there is one. If the engine
    depends on whether vLLM is installed, the result is ``("vllm", "transformers")``.
    """
    return ("vllm", "transformers") if run.engine == "maybe" else (run.engine,)


def _keyword_violations(run: Run, kind: str) -> Iterator[RuleViolation]:
    """Yield a violation for each keyword that has a problem of this ``kind``. If two engines are
    possible and one of them accepts the keyword, the violation is a warning.
    """
    engines = _possible_engines(run)
    for name, node in _valid_keywords(run).items():
        value, turns = node.to_plain(), is_multi_turn(run)
        results = [
            (engine, find_problem(name, value, engine, multi_turn=turns)) for engine in engines
        ]
        problems = [(engine, problem) for engine, problem in results if problem is not None]
        if not problems or problems[0][1].kind != kind:
            continue
        engine, problem = problems[0]
        is_certain = len(problems) == len(engines)
        notes = (
            ()
            if is_certain
            else (f"this applies if the run uses {ENGINE_NAMES[engine]}; {_CHOOSE_ENGINE}",)
        )
        yield RuleViolation(
            f"{_KWARGS}.{name}",
            problem.message,
            notes=notes,
            fixes=(_keyword_fix(run, node, problem),),
            on_key=kind != "value",
            severity=Severity.ERROR if is_certain else Severity.WARNING,
        )


_CHOOSE_ENGINE = "set runtime.engine to choose the engine"


def _keyword_fix(run: Run, node: Node, problem: Problem) -> Fix:
    """The fix of ``problem``. If a keyword is misspelled and its value is valid for the correct
    keyword, --fix can correct the spelling.
    """
    intended_name = problem.suggestion
    if intended_name is None or any(
        find_problem(intended_name, node.to_plain(), engine) for engine in _possible_engines(run)
    ):
        return Fix(problem.fix)
    if intended_name in _valid_keywords(run):
        return Fix(problem.fix)
    return Fix(problem.fix, run.rename_fix(node, intended_name).edits)


@rule(
    "GRPO030",
    _KEYS,
    example="grpo:\n  generation_kwargs: {seed: 7}\nruntime:\n  engine: vllm",
    fix="remove seed from generation_kwargs",
)
def no_owned_keywords(run: Run) -> Iterator[RuleViolation]:
    """generation_kwargs must not contain keywords that the toolkit sets itself.

    The toolkit computes a seed for each completion. It takes the number of completions from
    num_generations. It expects the engine's output in one fixed layout, so it also sets the
    keywords that change this layout.
    """
    yield from _keyword_violations(run, "owned")


@rule(
    "GRPO060",
    _KEYS,
    example="grpo:\n  generation_kwargs: {stop_strings: [END]}\nruntime:\n  engine: vllm",
    fix="generation_kwargs: {stop: [END]}",
)
def engine_reads_keywords(run: Run) -> Iterator[RuleViolation]:
    """The run's engine supports every keyword of generation_kwargs.

    vLLM and Hugging Face generation have different keywords. An unknown keyword would have no
    effect, or would end the run after the model is loaded.
    """
    yield from _keyword_violations(run, "unread")


@rule(
    "GRPO061",
    _KEYS,
    example="grpo:\n  generation_kwargs: {temperature: 0.7}",
    fix="set grpo.temperature: 0.7",
)
def keywords_do_not_repeat_fields(run: Run) -> Iterator[RuleViolation]:
    """generation_kwargs must not repeat keys of grpo.

    Training and the sizer read grpo.temperature, grpo.top_p and grpo.max_completion_length. A value
    in generation_kwargs would change only the sampling, so the run would train a different policy
    than it samples.
    """
    yield from _keyword_violations(run, "field")


@rule(
    "GRPO062",
    _KEYS,
    example="grpo:\n  generation_kwargs: {presence_penalty: 5}\nruntime:\n  engine: vllm",
    fix="generation_kwargs: {presence_penalty: 2.0}",
)
def keyword_values_are_valid(run: Run) -> Iterator[RuleViolation]:
    """The values of generation_kwargs have the type and range that the engine accepts.

    The engine refuses some wrong values only after the model is loaded, and silently ignores
    others.
    """
    yield from _keyword_violations(run, "value")


@rule(
    "GRPO063",
    f"{_KEYS} {_REGEX}",
    example="grpo:\n  generation_kwargs: {logit_bias: {9: 2.0}}\nruntime:\n  engine: vllm",
    fix="remove logit_bias from generation_kwargs",
    severity=Severity.WARNING,
)
def training_reproduces_keywords(run: Run) -> Iterator[RuleViolation]:
    """generation_kwargs contains only sampling keywords that training can apply too.

    Training applies temperature, top_p, top_k, min_p, repetition_penalty, presence_penalty and
    frequency_penalty to its own token distribution. It does not apply other keywords that ban,
    force or bias tokens. Importance weights correct for the difference, but over long completions
    these weights and the gradient may become 0.
    """
    engine = _possible_engines(run)[0]
    for name in unreproduced_keywords(_valid_keywords(run), engine):
        if find_problem(name, _valid_keywords(run)[name].to_plain(), engine) is None:
            yield RuleViolation(
                f"{_KWARGS}.{name}",
                "training does not apply this keyword to its token distribution",
                notes=(describe_mismatch(engine),),
                fixes=(Fix(f"remove {name}, and use a reward for the same purpose"),),
                on_key=True,
            )
    regex_applies = run.engine != "transformers" and run.value(_REGEX) is not None
    if regex_applies and _regex_problem(run) is None:  # GRPO064 reports this fault
        yield RuleViolation(
            _REGEX,
            "training does not apply the regular expression to its token distribution",
            notes=(describe_mismatch("vllm"),),
            fixes=(Fix("remove the key, and add the reward `regex_match` to reward.functions"),),
        )


@rule(
    "GRPO064",
    _REGEX,
    example="grpo:\n  vllm_structured_outputs_regex: '(?<=a)b'\nruntime: {engine: vllm}",
    fix="vllm_structured_outputs_regex: ab",
)
def regex_compiles_to_automaton(run: Run) -> Iterator[RuleViolation]:
    """vllm_structured_outputs_regex is a regular expression that vLLM can apply token by token.

    vLLM compiles the expression to an automaton, which supports neither look-around nor
    back-references. vLLM would refuse such an expression only in the first step, after the model
    has loaded.
    """
    problem = _regex_problem(run)
    if problem is not None:
        yield RuleViolation(_REGEX, problem)


def _regex_problem(run: Run) -> str | None:
    text = run.value(_REGEX)
    if run.engine == "transformers" or not isinstance(text, str):
        return None
    if _UNSUPPORTED_SYNTAX.search(text):
        return "vLLM supports neither look-around nor back-references"
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        # vLLM's syntax differs from Python's. Only faults in both syntaxes are reported.
        return (
            f"not a regular expression: {error}" if str(error).startswith(_SYNTAX_ERRORS) else None
        )
    return None
