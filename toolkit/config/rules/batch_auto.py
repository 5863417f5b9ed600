"""Rules on per_device_train_batch_size: auto. With this value, the sizer chooses the micro-batch
size.

The rules check that the run file sets the other keys that the sizer needs, and that the loss does
not depend on the micro-batch size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.config.finding import Fix
from toolkit.config.rules.batch import (
    ACCUMULATION_STEPS,
    GENERATION_BATCH_SIZE,
    GROUP_SIZE,
    MICRO_BATCH_SIZE,
    STEPS_PER_GENERATION,
    multiple_at_least,
)
from toolkit.config.rules.violation import RuleViolation, rule
from toolkit.config.trl_names import SPLIT_DEPENDENT_FIELDS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toolkit.config.rules.run import Run

ROUTER_LOSS = "grpo.router_aux_loss_coef"
USUAL_BATCH_SIZE, USUAL_MICRO_BATCH_SIZE = (
    64,
    8,
)  # usual completions per optimizer step, and per micro-batch


@rule(
    "GRPO028",
    f"{MICRO_BATCH_SIZE} {ACCUMULATION_STEPS} {GENERATION_BATCH_SIZE} {STEPS_PER_GENERATION}",
    example="grpo:\n  per_device_train_batch_size: auto\n  gradient_accumulation_steps: 4",
    fix="set gradient_accumulation_steps: auto and generation_batch_size: 64",
)
def auto_needs_batch_size(run: Run) -> Iterator[RuleViolation]:
    """per_device_train_batch_size: auto needs gradient_accumulation_steps: auto and a
    generation_batch_size.

    With auto, each optimizer step trains on one complete generation batch. generation_batch_size
    sets the number of completions in this batch. The sizer splits the batch into as few
    micro-batches as the card's memory allows. The size of the micro-batches and their number are
    the values of the two auto keys. steps_per_generation also sets the number of micro-batches, so
    it must not be set. num_iterations is still the number of optimizer steps that use the same
    generation batch.
    """
    auto_keys = [key for key in (MICRO_BATCH_SIZE, ACCUMULATION_STEPS) if run.value(key) == "auto"]
    if not auto_keys:
        return
    if len(auto_keys) == 1:
        other_key = ACCUMULATION_STEPS if auto_keys == [MICRO_BATCH_SIZE] else MICRO_BATCH_SIZE
        name, is_other_set = auto_keys[0].rpartition(".")[2], run.is_set(other_key)
        yield RuleViolation(
            other_key if is_other_set else auto_keys[0],
            f"must be auto because {name} is auto, got {run.value(other_key)}"
            if is_other_set
            else f"is auto, but {other_key.rpartition('.')[2]} is not: both must be auto",
            notes=(run.describe(auto_keys[0] if is_other_set else other_key),),
            fixes=(run.set_fix(other_key, "auto"),),
            related=(auto_keys[0],),
        )
        return
    group = run.get(GROUP_SIZE)
    multiple = group * run.replicas if isinstance(group, int) else USUAL_BATCH_SIZE
    size = multiple_at_least(multiple, USUAL_BATCH_SIZE)
    if run.value(STEPS_PER_GENERATION) is not None:
        yield RuleViolation(
            STEPS_PER_GENERATION,
            "cannot be set if per_device_train_batch_size is auto, because the sizer then chooses "
            "the number of micro-batches",
            notes=(run.describe(MICRO_BATCH_SIZE),),
            fixes=(
                run.set_fix(STEPS_PER_GENERATION, None)
                if run.value(GENERATION_BATCH_SIZE) is not None
                else _replace_steps_fix(run, size),
            ),
            related=(MICRO_BATCH_SIZE,),
        )
    elif run.value(GENERATION_BATCH_SIZE) is None:
        yield RuleViolation(
            MICRO_BATCH_SIZE,
            "is auto, but the run file sets no generation_batch_size for the sizer to split into "
            "micro-batches",
            notes=(run.describe(GENERATION_BATCH_SIZE),),
            fixes=(run.set_fix(GENERATION_BATCH_SIZE, size),),
        )


def _replace_steps_fix(run: Run, size: int) -> Fix:
    """The fix that replaces steps_per_generation by generation_batch_size."""
    node = run.node(STEPS_PER_GENERATION)
    assert node is not None
    name = GENERATION_BATCH_SIZE.rpartition(".")[2]
    edits = (*run.rename_fix(node, name).edits, *run.set_fix(STEPS_PER_GENERATION, size).edits)
    text = f"replace steps_per_generation by {name}: {size}"
    return Fix(text, edits if len(edits) == 2 else ())


@rule(
    "GRPO029",
    f"{MICRO_BATCH_SIZE} grpo.loss_type grpo.top_entropy_quantile grpo.entropy_coef "
    f"grpo.use_adaptive_entropy {ROUTER_LOSS}",
    example="""
grpo:
  per_device_train_batch_size: auto
  gradient_accumulation_steps: auto
  generation_batch_size: 64
  loss_type: bnpo
""",
    fix=(
        "set loss_type: dapo, or set per_device_train_batch_size and gradient_accumulation_steps "
        "to numbers"
    ),
)
def loss_ignores_micro_batch_size(run: Run) -> Iterator[RuleViolation]:
    """per_device_train_batch_size: auto needs a loss that does not depend on the micro-batch size.

    loss_type: bnpo averages over the tokens of each micro-batch. An entropy bonus,
    top_entropy_quantile below 1 and the auxiliary loss of a mixture-of-experts router are also
    computed per micro-batch. With these settings the trained model would depend on the memory of
    the card, so write a number instead of auto. With all other losses, another micro-batch size
    changes the result only by rounding.
    """
    if run.value(MICRO_BATCH_SIZE) != "auto":
        return
    clashes = [
        key
        for name, matters in SPLIT_DEPENDENT_FIELDS.items()
        if matters(run.get(key := f"grpo.{name}"))
    ]
    clash_texts = [run.describe(key) for key in clashes]
    fixes = [_explicit_sizes_fix(run)]
    if (
        ROUTER_LOSS not in clashes
        and run.get(ROUTER_LOSS) is None
        and (weight := _router_loss_weight(run))
    ):
        clashes.append(ROUTER_LOSS)
        clash_texts.append(f"router_aux_loss_coef {weight} (from the model's config.json)")
        fixes.insert(0, run.set_fix(ROUTER_LOSS, 0.0))
    if clashes:
        yield RuleViolation(
            MICRO_BATCH_SIZE,
            "auto cannot be used, because the loss depends on the micro-batch size",
            notes=("; ".join(clash_texts),),
            fixes=tuple(fixes),
            related=tuple(clashes),
        )


def _explicit_sizes_fix(run: Run) -> Fix:
    """The fix that sets per_device_train_batch_size and gradient_accumulation_steps to numbers
    that split the generation batch exactly.
    """
    size = run.value(GENERATION_BATCH_SIZE)
    completions_per_process = (
        size // run.replicas if size and size % run.replicas == 0 else USUAL_BATCH_SIZE
    )
    micro = next(
        candidate
        for candidate in range(USUAL_MICRO_BATCH_SIZE, 0, -1)
        if completions_per_process % candidate == 0
    )
    fixes = (
        run.set_fix(MICRO_BATCH_SIZE, micro),
        run.set_fix(ACCUMULATION_STEPS, completions_per_process // micro),
    )
    edits = tuple(edit for fix in fixes for edit in fix.edits)
    both_applicable = all(fix.edits for fix in fixes)
    return Fix(", ".join(fix.text for fix in fixes), edits if both_applicable else ())


def _router_loss_weight(run: Run) -> float:
    """The weight of the router's auxiliary loss (router_aux_loss_coef) in the model's config.json;
    0 if the model is not on this machine, has no experts, or sets no such weight.
    """
    if run.model is None or not run.model.is_mixture_of_experts:
        return 0.0
    coefficient = run.model.text_config.get("router_aux_loss_coef")
    return float(coefficient) if isinstance(coefficient, int | float) else 0.0
