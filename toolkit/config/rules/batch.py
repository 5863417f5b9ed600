"""Rules on batch sizes and groups, as TRL's GRPOConfig and trainer require. A group is the
num_generations completions of one prompt.
"""

from __future__ import annotations

from math import gcd
from typing import TYPE_CHECKING

from toolkit.config.rules.run import Unjudged
from toolkit.config.rules.violation import RuleViolation, rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toolkit.config.finding import Fix
    from toolkit.config.rules.run import Run

MICRO = "grpo.per_device_train_batch_size"
ACCUMULATION = "grpo.gradient_accumulation_steps"
STEPS = "grpo.steps_per_generation"
SIZE = "grpo.generation_batch_size"
GROUP = "grpo.num_generations"


def micro_batch(run: Run) -> int:
    """per_device_train_batch_size as a number. Raises Unjudged if the value is auto."""
    micro = run.value(MICRO)
    if not isinstance(micro, int) or run.value(ACCUMULATION) == "auto":
        raise Unjudged  # GRPO028 reports what auto requires
    return micro


def world(run: Run) -> str:
    """A text for a finding: the number of processes that train on different rows
    (``Run.world_size``).
    """
    return f"world size {run.world_size}" + (" (default)" if run.world_size == 1 else "")


@rule(
    "GRPO001",
    f"{GROUP} {MICRO} {ACCUMULATION} {STEPS} {SIZE}",
    example="""
grpo:
  num_generations: 8
  per_device_train_batch_size: 1
  gradient_accumulation_steps: 4
""",
    fix="gradient_accumulation_steps: 8, or num_generations: 2",
)
def whole_groups(run: Run) -> Iterator[RuleViolation]:
    """num_generations divides the generation batch.

    A generation batch is the completions that all processes draw together before they train. Its
    size is generation_batch_size. If this key is not set, the size is per_device_train_batch_size x
    world size x steps_per_generation. If steps_per_generation is not set either, the product uses
    gradient_accumulation_steps instead. Advantages compare the num_generations completions of one
    prompt, so the batch must contain all completions of each of its prompts.
    """
    group = run.value(GROUP)
    if group < 2 or (run.value(SIZE) is not None and run.value(STEPS) is not None):
        return  # GRPO002 or GRPO003 reports this fault
    batch, formula, factor = generation_batch(run)
    if batch % group == 0:
        return
    fixes: list[Fix] = []
    if factor in (ACCUMULATION, STEPS):
        per_step = micro_batch(run) * run.world_size
        step = group // gcd(group, per_step)
        fixes.append(run.to(factor, multiple_from(step, run.value(factor) or 1)))
    else:
        fixes.append(run.to(SIZE, multiple_from(group, batch)))
    smaller = nearest_divisor(batch, group)
    if smaller is not None:
        fixes.append(run.to(GROUP, smaller))
    if factor != SIZE and not any(fix.edits for fix in fixes):
        step = group // gcd(group, batch // micro_batch(run))
        fixes.append(run.to(MICRO, multiple_from(step, micro_batch(run))))
    related = tuple(path for path in (factor, MICRO) if path != GROUP)
    yield RuleViolation(
        GROUP,
        f"{group} completions per prompt do not divide the generation batch of {batch} completions",
        notes=(f"batch = {formula}",),
        fixes=tuple(sorted(fixes, key=lambda one: not one.edits)),
        related=related,
    )


def generation_batch(run: Run) -> tuple[int, str, str]:
    """Return three values: the number of completions in one generation batch, a text with the
    formula of this number, and the key whose value a fix changes.
    """
    size = run.value(SIZE)
    if size is not None:
        return size, run.operand(SIZE), SIZE
    steps = ACCUMULATION if run.value(STEPS) is None else STEPS
    batch = micro_batch(run) * run.world_size * run.value(steps)
    return batch, f"{run.operand(MICRO)} x {run.operand(steps)} x {world(run)}", steps


@rule(
    "GRPO002",
    GROUP,
    example="grpo:\n  num_generations: 1\n  per_device_train_batch_size: 8",
    fix="num_generations: 8",
)
def at_least_two(run: Run) -> Iterator[RuleViolation]:
    """num_generations is at least 2.

    The advantage of a completion compares its reward with the mean reward of its group, which is
    all completions of one prompt. In a group of one completion the advantage is always 0, so the
    model learns nothing.
    """
    node = run.node(GROUP)
    if node is None or type(node.value) is not int or node.value >= 2:
        return
    try:
        batch = generation_batch(run)[0]
    except (TypeError, Unjudged):
        batch = 8
    yield RuleViolation(
        GROUP,
        f"GRPO compares the completions of a prompt and needs at least 2, got {node.value}",
        fixes=(run.to(GROUP, nearest_divisor(batch, 8) or 2),),
    )


@rule(
    "GRPO003",
    f"{SIZE} {STEPS}",
    example="grpo:\n  generation_batch_size: 32\n  steps_per_generation: 4",
    fix="remove generation_batch_size or steps_per_generation",
)
def size_or_steps(run: Run) -> Iterator[RuleViolation]:
    """generation_batch_size and steps_per_generation are mutually exclusive.

    Each of the two determines the other: generation_batch_size = per_device_train_batch_size x
    world size x steps_per_generation.
    """
    size, steps = run.value(SIZE), run.value(STEPS)
    if size is None or steps is None:
        return
    implied = micro_batch(run) * run.world_size * steps
    yield RuleViolation(
        SIZE,
        f"{size} cannot be set together with steps_per_generation {steps}",
        notes=(f"{run.operand(MICRO)} x {run.operand(STEPS)} x {world(run)} = {implied}",),
        fixes=(run.to(SIZE, None), run.to(STEPS, None)),
        related=(STEPS,),
    )


@rule(
    "GRPO004",
    f"{SIZE} {MICRO}",
    example="""
grpo:
  generation_batch_size: 12
  per_device_train_batch_size: 8
  num_generations: 4
""",
    fix="generation_batch_size: 16",
)
def whole_steps(run: Run) -> Iterator[RuleViolation]:
    """generation_batch_size is a multiple of per_device_train_batch_size x world size.

    Every process splits its share of the generation batch into micro-batches of
    per_device_train_batch_size completions, and no completion may be left over. With
    per_device_train_batch_size: auto, the sizer chooses a micro-batch size that divides the share.
    Then it is enough that generation_batch_size is a multiple of the world size.
    """
    size, micro = run.value(SIZE), run.value(MICRO)
    if size is None or run.value(STEPS) is not None:
        return
    per_step = run.world_size if micro == "auto" else micro * run.world_size
    if size % per_step == 0:
        return
    group = run.value(GROUP)
    both = per_step * group // gcd(per_step, group)
    what = "world size" if micro == "auto" else "global micro-batch"
    yield RuleViolation(
        SIZE,
        f"{size} completions are not a multiple of the {what} ({per_step})",
        notes=(
            f"{run.operand(MICRO)}; {world(run)}"
            if micro == "auto"
            else f"{what} = {run.operand(MICRO)} x {world(run)}",
        ),
        fixes=(run.to(SIZE, multiple_from(both, size)),),
        related=(MICRO,),
    )


@rule(
    "GRPO005",
    "grpo.per_device_eval_batch_size grpo.num_generations_eval grpo.num_generations"
    " grpo.eval_on_start",
    example="""
grpo:
  eval_strategy: steps
  per_device_eval_batch_size: 4
  num_generations: 8
""",
    fix="per_device_eval_batch_size: 8",
)
def whole_eval_groups(run: Run) -> Iterator[RuleViolation]:
    """num_generations_eval divides the evaluation batch of all processes.

    If num_generations_eval is not set, num_generations is used. The rule applies only if
    eval_strategy or eval_on_start turns evaluation on.
    """
    if run.value("grpo.eval_strategy") == "no" and not run.ask("grpo.eval_on_start"):
        return
    key = "grpo.num_generations_eval"
    if run.value(key) is None:
        key = GROUP
    size_key = "grpo.per_device_eval_batch_size"
    size, group = run.value(size_key), run.value(key)
    batch = size * run.world_size
    if batch % group == 0:
        return
    step = group // gcd(group, run.world_size)
    fixes = [run.to(size_key, multiple_from(step, size))]
    smaller = nearest_divisor(batch, group, least=1)
    if smaller is not None:
        fixes.append(run.to("grpo.num_generations_eval", smaller))
    yield RuleViolation(
        size_key,
        f"{group} completions per prompt do not divide the evaluation batch of {batch} completions",
        notes=(f"batch = {run.operand(size_key)} x {world(run)}; group = {run.operand(key)}",),
        fixes=tuple(fixes),
        related=(key,),
    )


@rule(
    "GRPO006",
    "grpo.auto_find_batch_size",
    example="grpo:\n  auto_find_batch_size: true",
    fix="auto_find_batch_size: false",
)
def no_shrinking_batch(run: Run) -> Iterator[RuleViolation]:
    """auto_find_batch_size is refused.

    transformers would halve the batch after an out-of-memory error. The batch would then no longer
    contain all num_generations completions of each prompt. `envcheck size` finds a batch that fits
    before the run starts.
    """
    if run.value("grpo.auto_find_batch_size"):
        yield RuleViolation(
            "grpo.auto_find_batch_size",
            "transformers would halve the batch after an out-of-memory error, so that it no longer "
            "contains all completions of each prompt",
            fixes=(run.to("grpo.auto_find_batch_size", False),),
        )


@rule(
    "GRPO007",
    "grpo.parallelism_config",
    example="grpo:\n  parallelism_config: {cp_size: 2}",
    fix="remove parallelism_config",
)
def no_sequence_parallelism(run: Run) -> Iterator[RuleViolation]:
    """Sequence and context parallelism are refused.

    GRPO builds the model's inputs inside the trainer, after generation. At that point the batch can
    no longer be split along the sequence. To use several GPUs, start data-parallel processes with
    torchrun.
    """
    if run.node("grpo.parallelism_config") is not None:
        yield RuleViolation(
            "grpo.parallelism_config",
            "GRPO cannot split sequences across processes",
            on_key=True,
        )


def divisors_from(number: int, least: int) -> list[int]:
    """The divisors of ``number`` that are at least ``least``, in ascending order."""
    small = [one for one in range(1, int(number**0.5) + 1) if number % one == 0]
    return sorted({one for low in small for one in (low, number // low) if one >= least})


def nearest_divisor(number: int, wanted: int, least: int = 2) -> int | None:
    """The divisor of ``number`` that is closest to ``wanted`` and not below ``least``; None if
    there is no such divisor. If two divisors are equally close, the smaller one is returned.
    ``number`` itself is returned only if no other divisor fits.
    """
    every = divisors_from(number, least) if 0 < number < 10**9 else []
    found = [one for one in every if one < number] or every
    return min(found, key=lambda one: (abs(one - wanted), one)) if found else None


def multiple_from(step: int, wanted: int) -> int:
    """The smallest multiple of ``step`` that is at least ``wanted``."""
    return -(-wanted // step) * step
