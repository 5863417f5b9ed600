"""Rules on the learning rate schedule: its keywords (lr_scheduler_kwargs), its rates and its
warm-up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.base.did_you_mean import nearest
from toolkit.config.finding import Fix, Severity
from toolkit.config.rules.violation import RuleViolation, rule
from toolkit.config.trl_names import (
    PASSED_BY_THE_TRAINER,
    SCHEDULE_CHOICES,
    SCHEDULE_INTEGERS,
    SCHEDULE_SWITCHES,
    SCHEDULES,
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


def _keywords_in_file(run: Run) -> dict[str, Node] | None:
    """The keywords in the run file; None if lr_scheduler_kwargs is not a mapping."""
    node = run.node(KWARGS)
    if node is None or node.value is None:
        return {}
    return node.value if isinstance(node.value, dict) else None


def _schedule_of(run: Run) -> tuple[str, Schedule] | None:
    name = run.value(TYPE)
    return (name, SCHEDULES[name]) if name in SCHEDULES else None


@rule(
    "GRPO031",
    f"{TYPE} {KWARGS}",
    example="grpo:\n  lr_scheduler_type: warmup_stable_decay",
    fix="lr_scheduler_kwargs: {num_decay_steps: 100}",
)
def schedule_has_required_keywords(run: Run) -> Iterator[RuleViolation]:
    """lr_scheduler_kwargs has the keywords that lr_scheduler_type needs.

    warmup_stable_decay needs num_decay_steps. cosine_with_min_lr and cosine_warmup_with_min_lr need
    either min_lr or min_lr_rate.
    """
    named_schedule, keywords = _schedule_of(run), _keywords_in_file(run)
    if named_schedule is None or keywords is None:
        return
    schedule_name, schedule = named_schedule
    missing = [name for name in schedule.required if name not in keywords]
    min_rates = [name for name in ("min_lr", "min_lr_rate") if name in keywords]
    needs_min_rate = schedule_name in ("cosine_with_min_lr", "cosine_warmup_with_min_lr")
    if needs_min_rate and not min_rates:
        missing.append("min_lr_rate")
    for name in missing:
        required = "min_lr or min_lr_rate" if name == "min_lr_rate" else name
        yield RuleViolation(
            TYPE,
            f"{schedule_name} needs {required} in lr_scheduler_kwargs",
            notes=(run.describe(KWARGS),) if run.node(KWARGS) else (),
            fixes=(Fix(f"lr_scheduler_kwargs: {{{name}: {_EXAMPLES[name]}}}"),),
            related=(KWARGS,),
        )
    if needs_min_rate and len(min_rates) > 1:
        yield RuleViolation(
            KWARGS,
            f"the schedule {schedule_name} takes min_lr or min_lr_rate, not both",
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
    named_schedule, keywords = _schedule_of(run), _keywords_in_file(run)
    if named_schedule is None or not keywords:
        return
    schedule_name, schedule = named_schedule
    if not schedule.reads_kwargs:
        yield RuleViolation(
            KWARGS,
            f"has no effect: {schedule_name} takes no keywords",
            notes=(run.describe(TYPE),),
            fixes=(Fix("remove lr_scheduler_kwargs"),),
            severity=Severity.WARNING,
            on_key=True,
        )
        return
    for name, node in keywords.items():
        path = ("grpo", "lr_scheduler_kwargs", name)
        if name not in schedule.keywords:
            yield _unknown_keyword(run, schedule_name, schedule, name, node)
            continue
        legal_values = _legal_values(name, node)
        if legal_values is not None:
            yield RuleViolation(path, f"{schedule_name} takes {legal_values}, got {node.value!r}")


def _unknown_keyword(
    run: Run, schedule_name: str, schedule: Schedule, name: str, node: Node
) -> RuleViolation:
    """The violation for a keyword ``name`` that the user cannot set: the schedule has no such
    keyword, or the trainer itself passes it.
    """
    fixes: tuple[Fix, ...] = (Fix(f"remove {name}"),)
    keywords = ", ".join(schedule.keywords) or "none"
    message = f"{schedule_name} has no keyword {name}; its keywords: {keywords}"
    if name in PASSED_BY_THE_TRAINER:
        message = f"the trainer sets {name} of {schedule_name} (from warmup_steps and max_steps)"
    else:
        suggestion = nearest(name, schedule.keywords)
        if suggestion is not None:
            fixes = (run.rename_fix(node, suggestion),)
    return RuleViolation(
        ("grpo", "lr_scheduler_kwargs", name),
        message,
        notes=(run.describe(TYPE),),
        fixes=fixes,
        related=(TYPE,),
        on_key=node.key_position is not None,
    )


def _legal_values(name: str, node: Node) -> str | None:
    """If the value in the run file is invalid, return a text with the values that the keyword
    accepts. Otherwise return None.
    """
    value: Any = node.value
    if name in SCHEDULE_CHOICES:
        return (
            None
            if value in SCHEDULE_CHOICES[name]
            else f"one of {', '.join(SCHEDULE_CHOICES[name])} for {name}"
        )
    if name in SCHEDULE_SWITCHES:
        return None if isinstance(value, bool) else f"true or false for {name}"
    if name in SCHEDULE_INTEGERS:
        minimum = 1 if name in ("timescale", "window_size") else 0
        is_valid = type(value) is int and value >= minimum
        return None if is_valid else f"a whole number of at least {minimum} for {name}"
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
    named_schedule, keywords = _schedule_of(run), _keywords_in_file(run)
    if named_schedule is None or keywords is None:
        return
    schedule_name, rate = named_schedule[0], run.value(RATE)
    name = "lr_end" if schedule_name == "polynomial" else "min_lr"
    if name not in named_schedule[1].keywords:
        return
    default_rate = {"polynomial": _LR_END, "greedy": _GREEDY_MIN_LR}.get(schedule_name)
    lowest = keywords[name].value if name in keywords else default_rate
    if isinstance(lowest, bool) or not isinstance(lowest, (int, float)) or rate > lowest:
        return
    origin = run.origin(keywords.get(name))
    yield RuleViolation(
        RATE,
        f"learning_rate {rate} must be above {lowest}, the {name} of the {schedule_name} schedule",
        notes=(f"{run.describe(RATE)}; {name} {lowest} ({origin})",),
        fixes=(Fix(f"lr_scheduler_kwargs: {{{name}: {rate / 10:.1e}}}"),),
        related=(KWARGS, TYPE),
        severity=Severity.ERROR if schedule_name == "polynomial" else Severity.WARNING,
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
    steps, warmup, keywords = (
        run.value("grpo.max_steps"),
        run.value("grpo.warmup_steps"),
        _keywords_in_file(run),
    )
    if steps <= 1 or keywords is None:
        return
    if warmup >= steps:
        yield RuleViolation(
            "grpo.warmup_steps",
            f"the run has {steps} steps, so a warm-up of {warmup} steps does not end, and the rate "
            "never reaches learning_rate",
            notes=(run.describe("grpo.max_steps"),),
            fixes=(run.set_fix("grpo.warmup_steps", steps // 10),),
            related=("grpo.max_steps",),
        )
        return
    decay_node = keywords.get("num_decay_steps")
    if (
        run.value(TYPE) != "warmup_stable_decay"
        or decay_node is None
        or type(decay_node.value) is not int
    ):
        return
    warmup_steps = warmup if warmup >= 1 else round(warmup * steps)
    if warmup_steps + decay_node.value > steps:
        yield RuleViolation(
            ("grpo", "lr_scheduler_kwargs", "num_decay_steps"),
            f"{decay_node.value} decay steps do not fit after the warm-up",
            notes=(f"{warmup_steps} + {decay_node.value} > {run.describe('grpo.max_steps')}",),
            fixes=(run.replace_fix(decay_node, int(steps - warmup_steps)),),
            related=("grpo.max_steps",),
        )
