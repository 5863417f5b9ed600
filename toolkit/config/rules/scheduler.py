"""Rules on the learning rate schedule: its keywords (lr_scheduler_kwargs), its rates and its
warm-up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.base.did_you_mean import nearest
from toolkit.config.finding import Fix, Severity
from toolkit.config.rules.violation import RuleViolation, rule
from toolkit.config.trl_names import (
    CHOICES,
    PASSED_BY_THE_TRAINER,
    SCHEDULES,
    SWITCHES,
    WHOLE,
    Schedule,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toolkit.config.document import Node
    from toolkit.config.rules.run import Run

TYPE, KWARGS, RATE = "grpo.lr_scheduler_type", "grpo.lr_scheduler_kwargs", "grpo.learning_rate"
_EXAMPLES = {"num_decay_steps": 100, "min_lr_rate": 0.1}
_LR_END = 1e-7  # the final rate of a polynomial schedule without lr_end
_GREEDY_MIN_LR = 1e-3  # the lowest rate of greedy without min_lr


def _given(run: Run) -> dict[str, Node] | None:
    """The keywords in the run file; None if lr_scheduler_kwargs is not a mapping."""
    node = run.node(KWARGS)
    if node is None or node.value is None:
        return {}
    return node.value if isinstance(node.value, dict) else None


def _schedule(run: Run) -> tuple[str, Schedule] | None:
    kind = run.value(TYPE)
    return (kind, SCHEDULES[kind]) if kind in SCHEDULES else None


@rule(
    "GRPO031",
    f"{TYPE} {KWARGS}",
    example="grpo:\n  lr_scheduler_type: warmup_stable_decay",
    fix="lr_scheduler_kwargs: {num_decay_steps: 100}",
)
def schedule_has_what_it_needs(run: Run) -> Iterator[RuleViolation]:
    """lr_scheduler_kwargs has the keywords that lr_scheduler_type needs.

    warmup_stable_decay needs num_decay_steps. cosine_with_min_lr and cosine_warmup_with_min_lr need
    either min_lr or min_lr_rate.
    """
    found, given = _schedule(run), _given(run)
    if found is None or given is None:
        return
    kind, schedule = found
    missing = [name for name in schedule.needed if name not in given]
    either = [name for name in ("min_lr", "min_lr_rate") if name in given]
    wants_one = kind in ("cosine_with_min_lr", "cosine_warmup_with_min_lr")
    if wants_one and not either:
        missing.append("min_lr_rate")
    for name in missing:
        what = "min_lr or min_lr_rate" if name == "min_lr_rate" else name
        yield RuleViolation(
            TYPE,
            f"{kind} needs {what} in lr_scheduler_kwargs",
            notes=(run.describe(KWARGS),) if run.node(KWARGS) else (),
            fixes=(Fix(f"lr_scheduler_kwargs: {{{name}: {_EXAMPLES[name]}}}"),),
            related=(KWARGS,),
        )
    if wants_one and len(either) > 1:
        yield RuleViolation(
            KWARGS,
            f"the schedule {kind} takes min_lr or min_lr_rate, not both",
            fixes=(Fix("remove min_lr"), Fix("remove min_lr_rate")),
            related=(TYPE,),
        )


@rule(
    "GRPO032",
    f"{KWARGS} {TYPE}",
    example="grpo:\n  lr_scheduler_type: cosine\n  lr_scheduler_kwargs: {num_cycle: 2}",
    fix="lr_scheduler_kwargs: {num_cycles: 2}",
)
def schedule_knows_its_keywords(run: Run) -> Iterator[RuleViolation]:
    """lr_scheduler_kwargs contains only keywords of the schedule, with valid values.

    Each lr_scheduler_type has different keywords. The trainer itself passes the number of steps and
    the warm-up steps. linear accepts no keywords. constant and constant_with_warmup ignore all
    keywords.
    """
    found, given = _schedule(run), _given(run)
    if found is None or not given:
        return
    kind, schedule = found
    if not schedule.reads_kwargs:
        yield RuleViolation(
            KWARGS,
            f"has no effect: {kind} takes no keywords",
            notes=(run.describe(TYPE),),
            fixes=(Fix("remove lr_scheduler_kwargs"),),
            severity=Severity.WARNING,
            on_key=True,
        )
        return
    for name, node in given.items():
        place = ("grpo", "lr_scheduler_kwargs", name)
        if name not in schedule.keywords:
            yield _unknown(run, kind, schedule, name, node)
            continue
        wanted = _wanted(name, node)
        if wanted is not None:
            yield RuleViolation(place, f"{kind} takes {wanted}, got {node.value!r}")


def _unknown(run: Run, kind: str, schedule: Schedule, name: str, node: Node) -> RuleViolation:
    """The violation for a keyword that the schedule does not have or that the trainer passes
    itself.
    """
    fixes: tuple[Fix, ...] = (Fix(f"remove {name}"),)
    known = ", ".join(schedule.keywords) or "none"
    message = f"{kind} has no keyword {name}; its keywords: {known}"
    if name in PASSED_BY_THE_TRAINER:
        message = f"the trainer sets {name} of {kind} (from warmup_steps and max_steps)"
    else:
        close = nearest(name, schedule.keywords)
        if close is not None:
            fixes = (run.rename_fix(node, close),)
    return RuleViolation(
        ("grpo", "lr_scheduler_kwargs", name),
        message,
        notes=(run.describe(TYPE),),
        fixes=fixes,
        related=(TYPE,),
        on_key=node.key is not None,
    )


def _wanted(name: str, node: Node) -> str | None:
    """If the value in the run file is invalid, return a text with the values that the keyword
    accepts. Otherwise return None.
    """
    value: Any = node.value
    if name in CHOICES:
        return None if value in CHOICES[name] else f"one of {', '.join(CHOICES[name])} for {name}"
    if name in SWITCHES:
        return None if isinstance(value, bool) else f"true or false for {name}"
    if name in WHOLE:
        least = 1 if name in ("timescale", "window_size") else 0
        fits = type(value) is int and value >= least
        return None if fits else f"a whole number of at least {least} for {name}"
    if name in ("min_lr", "max_lr") and isinstance(value, list):
        return None  # one value for each parameter group
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"a number for {name}"
    if name == "factor" and not 0 < value < 1:
        return "a factor above 0 and below 1"
    return None if value >= 0 else f"a number of at least 0 for {name}"


@rule(
    "GRPO033",
    f"{RATE} {TYPE} {KWARGS}",
    example="grpo:\n  lr_scheduler_type: polynomial\n  learning_rate: 1.0e-8",
    fix="learning_rate: 1.0e-6",
)
def schedule_ends_below_its_start(run: Run) -> Iterator[RuleViolation]:
    """The schedule's lowest rate is below learning_rate.

    With lr_scheduler_type: polynomial the rate ends at lr_end (default 1e-7). transformers refuses
    an lr_end that is not below learning_rate. In other schedules min_lr is the lowest rate, and a
    min_lr above learning_rate increases the rate. With lr_scheduler_type: greedy the default of
    min_lr is 0.001, far above the usual rates of GRPO. The greedy schedule would raise the rate to
    0.001 at its first change.
    """
    found, given = _schedule(run), _given(run)
    if found is None or given is None:
        return
    kind, rate = found[0], run.value(RATE)
    name = "lr_end" if kind == "polynomial" else "min_lr"
    if name not in found[1].keywords:
        return
    implied = {"polynomial": _LR_END, "greedy": _GREEDY_MIN_LR}.get(kind)
    lowest = given[name].value if name in given else implied
    if isinstance(lowest, bool) or not isinstance(lowest, (int, float)) or rate > lowest:
        return
    origin = run.origin(given.get(name))
    yield RuleViolation(
        RATE,
        f"the rate {rate} must be above {name} ({lowest}) of the {kind} schedule",
        notes=(f"{run.describe(RATE)}; {name} {lowest} ({origin})",),
        fixes=(Fix(f"lr_scheduler_kwargs: {{{name}: {rate / 10:.1e}}}"),),
        related=(KWARGS, TYPE),
        severity=Severity.ERROR if kind == "polynomial" else Severity.WARNING,
    )


@rule(
    "GRPO034",
    f"grpo.warmup_steps grpo.max_steps {TYPE} {KWARGS}",
    example="grpo:\n  max_steps: 100\n  warmup_steps: 200",
    fix="warmup_steps: 10",
    severity=Severity.WARNING,
)
def schedule_fits_the_run(run: Run) -> Iterator[RuleViolation]:
    """The warm-up ends within the run, and the decay steps of warmup_stable_decay fit after the
    warm-up.

    With a warm-up of max_steps or more, the rate never reaches learning_rate. A value of
    warmup_steps of 1 or more is a number of steps, and a value below 1 is a fraction of the run.
    The rule is checked if max_steps sets the length of the run.
    """
    steps, warmup, given = run.value("grpo.max_steps"), run.value("grpo.warmup_steps"), _given(run)
    if steps <= 1 or given is None:
        return
    if warmup >= steps:
        yield RuleViolation(
            "grpo.warmup_steps",
            f"{warmup} warm-up steps do not end in a run of {steps} steps: the rate never reaches "
            "learning_rate",
            notes=(run.describe("grpo.max_steps"),),
            fixes=(run.set_fix("grpo.warmup_steps", steps // 10),),
            related=("grpo.max_steps",),
        )
        return
    decay = given.get("num_decay_steps")
    if run.value(TYPE) != "warmup_stable_decay" or decay is None or type(decay.value) is not int:
        return
    before = warmup if warmup >= 1 else round(warmup * steps)
    if before + decay.value > steps:
        yield RuleViolation(
            ("grpo", "lr_scheduler_kwargs", "num_decay_steps"),
            f"{decay.value} decay steps do not fit after the warm-up",
            notes=(f"{before} + {decay.value} > {run.describe('grpo.max_steps')}",),
            fixes=(run.replace_fix(decay, int(steps - before)),),
            related=("grpo.max_steps",),
        )
