"""Rules that compare the number of data rows with the number of prompts in one generation batch,
and a rule on the length of the run.
"""

from __future__ import annotations

from math import lcm
from typing import TYPE_CHECKING

from toolkit.config.data_facts import read_data_facts
from toolkit.config.finding import Severity
from toolkit.config.rules.batch import (
    ACCUMULATION_STEPS,
    GENERATION_BATCH_SIZE,
    GROUP_SIZE,
    MICRO_BATCH_SIZE,
    STEPS_PER_GENERATION,
    generation_batch,
    micro_batch_size,
)
from toolkit.config.rules.violation import RuleViolation, rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toolkit.config.finding import Fix
    from toolkit.config.rules.run import Run

_LIMIT, _PATH = "dataset.limit", "dataset.path"
_ENVIRONMENT, _ENVIRONMENT_SIZE = "environment", "environment.size"
_PROMPT_FEATURES = ("grpo.dynamic_sampling", "grpo.curriculum")
_FEATURE_KEYS = (
    f"{' '.join(_PROMPT_FEATURES)} {_PATH} {_LIMIT} {_ENVIRONMENT_SIZE} {GROUP_SIZE} "
    f"{GENERATION_BATCH_SIZE}"
)
_ROW_KEYS = (
    f"{_PATH} {_LIMIT} {_ENVIRONMENT_SIZE} {GROUP_SIZE} {GENERATION_BATCH_SIZE} "
    f"{STEPS_PER_GENERATION} {ACCUMULATION_STEPS} {MICRO_BATCH_SIZE}"
)


@rule(
    "GRPO043",
    _ROW_KEYS,
    example="""
dataset:
  path: train.jsonl  # 100 rows
grpo:
  per_device_train_batch_size: 8
  gradient_accumulation_steps: 128
  num_generations: 8
""",
    fix="gradient_accumulation_steps: 64",
)
def rows_fill_a_generation(run: Run) -> Iterator[RuleViolation]:
    """The dataset or the environment has enough rows for at least one generation batch.

    A generation batch of N completions needs N / num_generations prompts over all processes, each
    from a different row. TRL drops rows that do not fill a generation batch, so with too few rows
    nothing is trained. Rows without a prompt do not count. The rule is checked if the rows can be
    counted or dataset.limit is set. An environment has environment.size rows.
    """
    has_environment = run.node(_ENVIRONMENT) is not None
    if run.value(_PATH) is None and not has_environment:
        return
    rows, origin = _environment_rows(run) if has_environment else _row_count(run)
    batch, formula, key_to_fix = generation_batch(run)
    group = run.value(GROUP_SIZE)
    if rows is None or group < 2 or batch % group:  # GRPO001 or GRPO002 reports this fault
        return
    needed_rows = batch // group
    if rows >= needed_rows:
        return
    is_limited = not has_environment and run.node(_LIMIT) is not None and rows == run.get(_LIMIT)
    fixes = _row_fixes(run, rows, needed_rows, key_to_fix, is_limited=is_limited)
    if has_environment:
        key, fixes = _ENVIRONMENT_SIZE, (*fixes, run.set_fix(_ENVIRONMENT_SIZE, needed_rows))
    else:
        key = _LIMIT if is_limited else _PATH
    yield RuleViolation(
        key,
        f"{rows} rows do not fill one generation batch of {needed_rows} prompts: nothing is "
        "trained",
        notes=(
            f"prompts = {batch} completions / {run.describe(GROUP_SIZE)}; completions = {formula}",
            f"rows = {origin}",
        ),
        fixes=fixes,
        related=(key_to_fix, GROUP_SIZE),
    )


def _environment_rows(run: Run) -> tuple[int | None, str]:
    """The number of rows of the environment, and a text that names its origin."""
    return run.value(_ENVIRONMENT_SIZE), run.describe(_ENVIRONMENT_SIZE)


def _row_count(run: Run) -> tuple[int | None, str]:
    """The largest possible number of rows to train on (None if it is unknown), and a text that
    names the origin of the number.
    """
    limit = run.value(_LIMIT)
    data = read_data_facts(run.document, "path")
    if data is None or not data.rows or not data.is_complete:
        return limit, run.describe(_LIMIT)
    rows = data.rows - data.empty_prompts
    if limit is not None and limit <= rows:
        return limit, run.describe(_LIMIT)
    return rows, f"{rows} with a prompt in {data.path.name}"


def _row_fixes(
    run: Run, rows: int, needed_rows: int, key_to_fix: str, *, is_limited: bool
) -> tuple[Fix, ...]:
    """The possible fixes: a smaller generation batch that the rows fill, and a higher dataset.limit
    if the data may have enough rows.
    """
    fixes = []
    group = run.value(GROUP_SIZE)
    if key_to_fix == GENERATION_BATCH_SIZE:
        is_auto = "auto" in (run.get(MICRO_BATCH_SIZE), run.get(ACCUMULATION_STEPS))
        size_multiple = run.replicas if is_auto else micro_batch_size(run) * run.replicas
        size = _largest_multiple(size_multiple, rows * group, group)
        if size:
            fixes.append(run.set_fix(GENERATION_BATCH_SIZE, size))
    else:
        size_multiple = micro_batch_size(run) * run.replicas
        size = _largest_multiple(size_multiple, rows * group, group)
        if size:
            fixes.append(run.set_fix(key_to_fix, size // size_multiple))
    if is_limited:
        data = read_data_facts(run.document, "path")
        may_have_enough_rows = (
            data is None
            or not data.rows
            or not data.is_complete
            or data.rows - data.empty_prompts >= needed_rows
        )
        if may_have_enough_rows:
            fixes.append(run.set_fix(_LIMIT, needed_rows))
    return tuple(fixes)


def _largest_multiple(step: int, limit: int, group: int) -> int:
    """The largest common multiple of ``step`` and ``group`` up to ``limit``; 0 if none exists."""
    common_multiple = lcm(step, group)
    return limit // common_multiple * common_multiple


@rule(
    "GRPO070",
    _FEATURE_KEYS,
    example="""
dataset:
  path: train.jsonl  # 4 rows
grpo:
  dynamic_sampling: true
  generation_batch_size: 32
  num_generations: 8
""",
    fix="set dynamic_sampling: false, or add rows to the dataset",
    severity=Severity.WARNING,
)
def prompts_to_choose_from(run: Run) -> Iterator[RuleViolation]:
    """dynamic_sampling and curriculum need a dataset that has more rows than a generation batch
    has prompts.

    Each of these features can replace a row of the batch by a row that is not in the batch. If
    every batch needs all rows of the dataset, there is no such row, and the feature has no effect.
    The rule is checked if the rows can be counted.
    """
    active_features = [key for key in _PROMPT_FEATURES if run.get(key) is True]
    if not active_features:
        return
    if run.node(_ENVIRONMENT) is not None:
        (rows, origin), rows_key = _environment_rows(run), _ENVIRONMENT_SIZE
    else:
        (rows, origin), rows_key = _row_count(run), _PATH
    batch, formula, _ = generation_batch(run)
    group = run.value(GROUP_SIZE)
    # GRPO043 reports fewer rows
    if rows is None or group < 2 or batch % group or rows != batch // group:
        return
    for key in active_features:
        yield RuleViolation(
            key,
            f"has no effect: every generation batch needs all {rows} rows, so there are no other "
            "rows to choose from",
            notes=(
                f"prompts = {batch} completions / {run.describe(GROUP_SIZE)}; "
                f"completions = {formula}",
                f"rows = {origin}",
            ),
            fixes=(run.set_fix(key, False),),
            related=(rows_key, GROUP_SIZE),
        )


@rule(
    "GRPO052",
    "grpo.num_train_epochs grpo.max_steps",
    example="grpo:\n  num_train_epochs: 0",
    fix="num_train_epochs: 1.0",
)
def run_has_a_length(run: Run) -> Iterator[RuleViolation]:
    """num_train_epochs is above 0 unless max_steps sets the length of the run.

    A run of 0 epochs ends without a step.
    """
    epochs, steps = run.value("grpo.num_train_epochs"), run.value("grpo.max_steps")
    if epochs == 0 and steps <= 0:
        yield RuleViolation(
            "grpo.num_train_epochs",
            "with 0 epochs nothing is trained",
            notes=(run.describe("grpo.max_steps"),),
            fixes=(run.set_fix("grpo.num_train_epochs", 1.0),),
            related=("grpo.max_steps",),
        )
