"""Rules on batch sizes and groups, as TRL's GRPOConfig and trainer require. A group is the
num_generations completions of one prompt.
"""

from __future__ import annotations

from math import gcd
from typing import TYPE_CHECKING

from toolkit.config.rules.run import SkipRule
from toolkit.config.rules.violation import RuleViolation, rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toolkit.config.finding import Fix
    from toolkit.config.rules.run import Run

MICRO_BATCH_SIZE = "grpo.per_device_train_batch_size"
ACCUMULATION_STEPS = "grpo.gradient_accumulation_steps"
STEPS_PER_GENERATION = "grpo.steps_per_generation"
GENERATION_BATCH_SIZE = "grpo.generation_batch_size"
GROUP_SIZE = "grpo.num_generations"


def micro_batch_size(run: Run) -> int:
    """per_device_train_batch_size as a number. Raises SkipRule if the value is auto."""
    size = run.value(MICRO_BATCH_SIZE)
    if not isinstance(size, int) or run.value(ACCUMULATION_STEPS) == "auto":
        raise SkipRule  # GRPO028 reports what auto requires
    return size


def describe_replicas(run: Run) -> str:
    """Return a text for a finding that states the number of replicas (``Run.replicas``). No two
    replicas train on the same rows. If each replica is one process, the text says "world size"
    instead of "number of replicas".
    """
    if run.replicas != run.world_size:
        size = run.world_size // run.replicas
        return (
            f"number of replicas {run.replicas} (world size {run.world_size} / "
            f"tensor_parallel_size {size})"
        )
    return f"world size {run.world_size}" + (" (default)" if run.world_size == 1 else "")


@rule(
    "GRPO001",
    f"{GROUP_SIZE} {MICRO_BATCH_SIZE} {ACCUMULATION_STEPS} {STEPS_PER_GENERATION} "
    f"{GENERATION_BATCH_SIZE}",
    example="""
grpo:
  num_generations: 8
  per_device_train_batch_size: 1
  gradient_accumulation_steps: 4
""",
    fix="gradient_accumulation_steps: 8, or num_generations: 2",
)
def group_size_divides_batch(run: Run) -> Iterator[RuleViolation]:
    """The generation batch is a multiple of num_generations.

    A generation batch is the completions that all processes draw together before they train. Its
    size is generation_batch_size. If this key is not set, the size is per_device_train_batch_size x
    world size x steps_per_generation. If steps_per_generation is not set either, the product uses
    gradient_accumulation_steps instead. Advantages compare the num_generations completions of one
    prompt, so the batch must contain all completions of each of its prompts.
    """
    group = run.value(GROUP_SIZE)
    if group < 2 or (
        run.value(GENERATION_BATCH_SIZE) is not None and run.value(STEPS_PER_GENERATION) is not None
    ):
        return  # GRPO002 or GRPO003 reports this fault
    batch, formula, key_to_fix = generation_batch(run)
    if batch % group == 0:
        return
    fixes: list[Fix] = []
    if key_to_fix in (ACCUMULATION_STEPS, STEPS_PER_GENERATION):
        global_micro_batch = micro_batch_size(run) * run.replicas
        multiple = group // gcd(group, global_micro_batch)
        fixes.append(
            run.set_fix(key_to_fix, multiple_at_least(multiple, run.value(key_to_fix) or 1))
        )
    else:
        fixes.append(run.set_fix(GENERATION_BATCH_SIZE, multiple_at_least(group, batch)))
    nearest_group_size = nearest_divisor(batch, group)
    if nearest_group_size is not None:
        fixes.append(run.set_fix(GROUP_SIZE, nearest_group_size))
    if key_to_fix != GENERATION_BATCH_SIZE and not any(fix.edits for fix in fixes):
        multiple = group // gcd(group, batch // micro_batch_size(run))
        fixes.append(
            run.set_fix(MICRO_BATCH_SIZE, multiple_at_least(multiple, micro_batch_size(run)))
        )
    related = tuple(path for path in (key_to_fix, MICRO_BATCH_SIZE) if path != GROUP_SIZE)
    yield RuleViolation(
        GROUP_SIZE,
        f"the generation batch of {batch} completions is not a multiple of {group} completions per "
        "prompt",
        notes=(f"batch = {formula}",),
        fixes=tuple(sorted(fixes, key=lambda fix: not fix.edits)),
        related=related,
    )


def generation_batch(run: Run) -> tuple[int, str, str]:
    """Return three values: the number of completions in one generation batch, the formula of this
    number as text, and the key of the run file that a fix of this number changes.
    """
    size = run.value(GENERATION_BATCH_SIZE)
    if size is not None:
        return size, run.describe(GENERATION_BATCH_SIZE), GENERATION_BATCH_SIZE
    steps_key = (
        ACCUMULATION_STEPS if run.value(STEPS_PER_GENERATION) is None else STEPS_PER_GENERATION
    )
    batch = micro_batch_size(run) * run.replicas * run.value(steps_key)
    return (
        batch,
        f"{run.describe(MICRO_BATCH_SIZE)} x {run.describe(steps_key)} x {describe_replicas(run)}",
        steps_key,
    )


@rule(
    "GRPO002",
    GROUP_SIZE,
    example="grpo:\n  num_generations: 1\n  per_device_train_batch_size: 8",
    fix="num_generations: 8",
)
def group_has_two_completions(run: Run) -> Iterator[RuleViolation]:
    """num_generations is at least 2.

    The advantage of a completion compares its reward with the mean reward of its group, which is
    all completions of one prompt. In a group of one completion the advantage is always 0, so the
    model learns nothing.
    """
    node = run.node(GROUP_SIZE)
    if node is None or type(node.value) is not int or node.value >= 2:
        return
    try:
        batch = generation_batch(run)[0]
    except (TypeError, SkipRule):
        batch = 8
    yield RuleViolation(
        GROUP_SIZE,
        f"GRPO compares the completions of a prompt and needs at least 2, got {node.value}",
        fixes=(run.set_fix(GROUP_SIZE, nearest_divisor(batch, 8) or 2),),
    )


@rule(
    "GRPO003",
    f"{GENERATION_BATCH_SIZE} {STEPS_PER_GENERATION}",
    example="grpo:\n  generation_batch_size: 32\n  steps_per_generation: 4",
    fix="remove generation_batch_size or steps_per_generation",
)
def batch_size_excludes_steps(run: Run) -> Iterator[RuleViolation]:
    """generation_batch_size and steps_per_generation are mutually exclusive.

    Each of the two determines the other: generation_batch_size = per_device_train_batch_size x
    world size x steps_per_generation.
    """
    size, steps = run.value(GENERATION_BATCH_SIZE), run.value(STEPS_PER_GENERATION)
    if size is None or steps is None:
        return
    implied = micro_batch_size(run) * run.replicas * steps
    yield RuleViolation(
        GENERATION_BATCH_SIZE,
        f"{size} cannot be set together with steps_per_generation {steps}",
        notes=(
            f"{run.describe(MICRO_BATCH_SIZE)} x {run.describe(STEPS_PER_GENERATION)} x "
            f"{describe_replicas(run)} = {implied}",
        ),
        fixes=(run.set_fix(GENERATION_BATCH_SIZE, None), run.set_fix(STEPS_PER_GENERATION, None)),
        related=(STEPS_PER_GENERATION,),
    )


@rule(
    "GRPO004",
    f"{GENERATION_BATCH_SIZE} {MICRO_BATCH_SIZE}",
    example="""
grpo:
  generation_batch_size: 12
  per_device_train_batch_size: 8
  num_generations: 4
""",
    fix="generation_batch_size: 16",
)
def batch_is_multiple_of_micro_batch(run: Run) -> Iterator[RuleViolation]:
    """generation_batch_size is a multiple of per_device_train_batch_size x world size.

    Every process splits its share of the generation batch into micro-batches of
    per_device_train_batch_size completions, and no completion may be left over. With
    per_device_train_batch_size: auto, the sizer chooses a micro-batch size that divides the share.
    Then it is enough that generation_batch_size is a multiple of the world size.
    """
    size, micro = run.value(GENERATION_BATCH_SIZE), run.value(MICRO_BATCH_SIZE)
    if size is None or run.value(STEPS_PER_GENERATION) is not None:
        return
    global_micro_batch = run.replicas if micro == "auto" else micro * run.replicas
    if size % global_micro_batch == 0:
        return
    group = run.value(GROUP_SIZE)
    common_multiple = global_micro_batch * group // gcd(global_micro_batch, group)
    unit = "number of replicas" if micro == "auto" else "global micro-batch"
    yield RuleViolation(
        GENERATION_BATCH_SIZE,
        f"{size} completions are not a multiple of the {unit} ({global_micro_batch})",
        notes=(
            f"{run.describe(MICRO_BATCH_SIZE)}; {describe_replicas(run)}"
            if micro == "auto"
            else f"{unit} = {run.describe(MICRO_BATCH_SIZE)} x {describe_replicas(run)}",
        ),
        fixes=(run.set_fix(GENERATION_BATCH_SIZE, multiple_at_least(common_multiple, size)),),
        related=(MICRO_BATCH_SIZE,),
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
def group_size_divides_eval_batch(run: Run) -> Iterator[RuleViolation]:
    """The evaluation batch of all processes is a multiple of num_generations_eval.

    If num_generations_eval is not set, num_generations is used. The rule applies only if
    eval_strategy or eval_on_start turns evaluation on.
    """
    if run.value("grpo.eval_strategy") == "no" and not run.get("grpo.eval_on_start"):
        return
    key = "grpo.num_generations_eval"
    if run.value(key) is None:
        key = GROUP_SIZE
    size_key = "grpo.per_device_eval_batch_size"
    size, group = run.value(size_key), run.value(key)
    batch = size * run.replicas
    if batch % group == 0:
        return
    multiple = group // gcd(group, run.replicas)
    fixes = [run.set_fix(size_key, multiple_at_least(multiple, size))]
    nearest_group_size = nearest_divisor(batch, group, minimum=1)
    if nearest_group_size is not None:
        fixes.append(run.set_fix("grpo.num_generations_eval", nearest_group_size))
    yield RuleViolation(
        size_key,
        f"the evaluation batch of {batch} completions is not a multiple of {group} completions per "
        "prompt",
        notes=(
            f"batch = {run.describe(size_key)} x {describe_replicas(run)}; "
            f"group = {run.describe(key)}",
        ),
        fixes=tuple(fixes),
        related=(key,),
    )


@rule(
    "GRPO006",
    "grpo.auto_find_batch_size",
    example="grpo:\n  auto_find_batch_size: true",
    fix="auto_find_batch_size: false",
)
def no_automatic_batch_size(run: Run) -> Iterator[RuleViolation]:
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
            fixes=(run.set_fix("grpo.auto_find_batch_size", False),),
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


def divisors_at_least(number: int, minimum: int) -> list[int]:
    """The divisors of ``number`` that are at least ``minimum``, in ascending order."""
    small = [divisor for divisor in range(1, int(number**0.5) + 1) if number % divisor == 0]
    return sorted(
        {divisor for low in small for divisor in (low, number // low) if divisor >= minimum}
    )


def nearest_divisor(number: int, target: int, minimum: int = 2) -> int | None:
    """The divisor of ``number`` that is closest to ``target`` and not below ``minimum``; None if
    there is no such divisor. If two divisors are equally close, the smaller one is returned.
    ``number`` itself is returned only if no other divisor fits.
    """
    divisors = divisors_at_least(number, minimum) if 0 < number < 10**9 else []
    candidates = [divisor for divisor in divisors if divisor < number] or divisors
    return (
        min(candidates, key=lambda divisor: (abs(divisor - target), divisor))
        if candidates
        else None
    )


def multiple_at_least(step: int, minimum: int) -> int:
    """The smallest multiple of ``step`` that is at least ``minimum``."""
    return -(-minimum // step) * step
