"""Sampling keywords: what the engine of the run does with each of ``grpo.generation_kwargs``."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from toolkit.config.finding import Fix, Severity
from toolkit.config.rules.violation import Fault, rule
from toolkit.config.sampling_keywords import NAMES, judge, not_reproduced, what_follows

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from toolkit.config.document import Node
    from toolkit.config.rules.run import Run
    from toolkit.config.sampling_keywords import Engine, Problem

_KWARGS = "grpo.generation_kwargs"
_REGEX = "grpo.vllm_structured_outputs_regex"
_BROKEN = ("missing )", "unbalanced", "unterminated", "nothing to repeat")
_NO_AUTOMATON = re.compile(r"(?<!\\)\(\?<?[=!]|\\[1-9]|\(\?P=")
_KEYS = f"{_KWARGS} runtime.engine model.fast_inference"


def _written(run: Run) -> Mapping[str, Node]:
    """The keywords, less those with a value that is faulty in itself."""
    node = run.node(_KWARGS)
    if node is None or not isinstance(node.value, dict) or not run.written(_KWARGS):
        return {}
    place = tuple(_KWARGS.split("."))
    faulty = {path[2] for path in run.bad if path[:2] == place and len(path) > 2}
    return {
        name: one
        for name, one in node.value.items()
        if name not in faulty and all(_finite(below.value) for _, below in one.walk(()))
    }


def _finite(value: Any) -> bool:
    """False for the numbers that rule DOC006 refuses."""
    return not isinstance(value, float) or math.isfinite(value)


def _engines(run: Run) -> tuple[Engine, ...]:
    """Those that may generate, the one that is used where it is installed first."""
    return ("vllm", "transformers") if run.engine == "maybe" else (run.engine,)


def _faults(run: Run, kind: str) -> Iterator[Fault]:
    """Keywords whose first problem is of ``kind``. What one of two possible engines takes is a
    warning.
    """
    engines = _engines(run)
    for name, node in _written(run).items():
        found = [(engine, judge(name, node.to_plain(), engine)) for engine in engines]
        problems = [(engine, problem) for engine, problem in found if problem is not None]
        if not problems or problems[0][1].kind != kind:
            continue
        engine, problem = problems[0]
        certain = len(problems) == len(engines)
        notes = () if certain else (f"so it is where {NAMES[engine]} generates; {_CHOOSE}",)
        yield Fault(
            f"{_KWARGS}.{name}",
            problem.message,
            notes=notes,
            fixes=(_fix(run, node, problem),),
            on_key=kind != "value",
            severity=Severity.ERROR if certain else Severity.WARNING,
        )


_CHOOSE = "runtime.engine says which it is"


def _fix(run: Run, node: Node, problem: Problem) -> Fix:
    """The fix of ``problem``; a slip of the pen whose value is good for the word that was meant can
    be mended by --fix.
    """
    meant = problem.meant
    if meant is None or any(judge(meant, node.to_plain(), one) for one in _engines(run)):
        return Fix(problem.fix)
    if meant in _written(run):
        return Fix(problem.fix)
    return Fix(problem.fix, run.rename(node, meant).edits)


@rule(
    "GRPO030",
    _KEYS,
    example="grpo:\n  generation_kwargs: {seed: 7}\nruntime:\n  engine: vllm",
    fix="leave seed out of generation_kwargs",
)
def owned_keywords(run: Run) -> Iterator[Fault]:
    """generation_kwargs leaves out what the toolkit sets itself.

    Seeds are derived for each completion, the number of completions is num_generations, and what
    an engine returns is read in one layout.
    """
    yield from _faults(run, "owned")


@rule(
    "GRPO060",
    _KEYS,
    example="grpo:\n  generation_kwargs: {stop_strings: [END]}\nruntime:\n  engine: vllm",
    fix="generation_kwargs: {stop: [END]}",
)
def read_keywords(run: Run) -> Iterator[Fault]:
    """Every keyword of generation_kwargs is read by the engine of the run.

    vLLM and Hugging Face generation have keywords of their own. One that is not read would change
    nothing, or end the run after the model is loaded.
    """
    yield from _faults(run, "unread")


@rule(
    "GRPO061",
    _KEYS,
    example="grpo:\n  generation_kwargs: {temperature: 0.7}",
    fix="temperature: 0.7, as a key of grpo",
)
def doubled_keywords(run: Run) -> Iterator[Fault]:
    """generation_kwargs leaves out what is a key of grpo itself.

    The training pass and the sizer read grpo.temperature, grpo.top_p and max_completion_length. A
    second word for one of them would change the sampler alone, and another policy would be trained
    than is sampled.
    """
    yield from _faults(run, "field")


@rule(
    "GRPO062",
    _KEYS,
    example="grpo:\n  generation_kwargs: {presence_penalty: 5}\nruntime:\n  engine: vllm",
    fix="generation_kwargs: {presence_penalty: 2.0}",
)
def keyword_values(run: Run) -> Iterator[Fault]:
    """The values of generation_kwargs have the type and the range that the engine takes.

    Some are refused after the model is loaded, others are left out without a message.
    """
    yield from _faults(run, "value")


@rule(
    "GRPO063",
    f"{_KEYS} {_REGEX}",
    example="grpo:\n  generation_kwargs: {logit_bias: {9: 2.0}}\nruntime:\n  engine: vllm",
    fix="leave logit_bias out of generation_kwargs",
    severity=Severity.WARNING,
)
def followed_keywords(run: Run) -> Iterator[Fault]:
    """The training pass can follow what is done to the distribution while sampling.

    temperature, top_p, top_k, min_p, repetition_penalty, presence_penalty and frequency_penalty are
    applied in training too. Where tokens are banned, forced or biased in other ways, the importance
    weights carry the difference; over long completions they may reach 0, and the gradient with
    them.
    """
    engine = _engines(run)[0]
    for name in not_reproduced(_written(run), engine):
        if judge(name, _written(run)[name].to_plain(), engine) is None:
            yield Fault(
                f"{_KWARGS}.{name}",
                "training does not follow it",
                notes=(what_follows(engine),),
                fixes=(Fix(f"leave {name} out, and let the reward judge it"),),
                on_key=True,
            )
    there = run.engine != "transformers" and run.value(_REGEX) is not None
    if there and _no_automaton(run) is None:  # GRPO064
        yield Fault(
            _REGEX,
            "training does not follow it",
            notes=(what_follows("vllm"),),
            fixes=(Fix("leave it out, and reward the format (functions: [{name: regex_match}])"),),
        )


@rule(
    "GRPO064",
    _REGEX,
    example="grpo:\n  vllm_structured_outputs_regex: '(?<=a)b'\nruntime: {engine: vllm}",
    fix="vllm_structured_outputs_regex: ab",
)
def regex_is_an_automaton(run: Run) -> Iterator[Fault]:
    """vllm_structured_outputs_regex is a regular expression that vLLM can follow token by token.

    It is made into an automaton, which has no look-around and no back-references. vLLM refuses
    them in the first step, after the model has loaded.
    """
    wrong = _no_automaton(run)
    if wrong is not None:
        yield Fault(_REGEX, wrong)


def _no_automaton(run: Run) -> str | None:
    text = run.value(_REGEX)
    if run.engine == "transformers" or not isinstance(text, str):
        return None
    if _NO_AUTOMATON.search(text):
        return "vLLM has no look-around and no back-references in it"
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        # The syntax of vLLM's grammars is not Python's: only what is wrong in both is told.
        return f"not a regular expression: {error}" if str(error).startswith(_BROKEN) else None
    return None
