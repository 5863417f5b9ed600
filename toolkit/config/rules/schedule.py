"""Rules on 16-bit formats, evaluation, checkpoints, schedules and data workers, as transformers'
TrainingArguments requires.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.config.rules.violation import RuleViolation, rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toolkit.config.rules.run import Run

_EVAL, _SAVE = "grpo.eval_strategy", "grpo.save_strategy"
_EVAL_STEPS, _SAVE_STEPS = "grpo.eval_steps", "grpo.save_steps"
_BEST = "grpo.load_best_model_at_end"
_SCHEDULER = "grpo.lr_scheduler_type"
_MILLIONTHS = 1_000_000  # transformers compares fractions of a run in millionths


@rule(
    "GRPO023",
    "grpo.bf16 grpo.fp16 grpo.bf16_full_eval grpo.fp16_full_eval model.dtype",
    example="grpo:\n  bf16: true\n  fp16: true",
    fix="fp16: false",
)
def one_half_precision(run: Run) -> Iterator[RuleViolation]:
    """bf16 and fp16 are mutually exclusive, and so are bf16_full_eval and fp16_full_eval.

    The trainer computes in only one number format. model.dtype: auto chooses the format that the
    card supports, or float16 if fp16 is true. If model.dtype is a 16-bit format, the engine samples
    in this format, and the trainer must compute in the same format.
    """
    for precision_key, dtype in (("grpo.fp16", "bfloat16"), ("grpo.bf16", "float16")):
        if run.get(precision_key) and run.get("model.dtype") == dtype:
            yield RuleViolation(
                precision_key,
                f"the engine would compute in {dtype}, but the trainer in another 16-bit format",
                notes=(run.describe("model.dtype"),),
                fixes=(run.set_fix(precision_key, False), run.set_fix("model.dtype", "auto")),
                related=("model.dtype",),
            )
    for suffix in ("", "_full_eval"):
        bf16, fp16 = f"grpo.bf16{suffix}", f"grpo.fp16{suffix}"
        if run.get(bf16) and run.get(fp16):
            yield RuleViolation(
                fp16,
                f"fp16{suffix} and bf16{suffix} cannot both be true",
                notes=(run.describe(bf16),),
                fixes=(run.set_fix(fp16, False),),
                related=(bf16,),
            )


@rule(
    "GRPO024",
    f"{_BEST} {_EVAL} {_SAVE} {_EVAL_STEPS} {_SAVE_STEPS}",
    example="grpo:\n  load_best_model_at_end: true\n  eval_strategy: epoch",
    fix="save_strategy: epoch",
)
def best_model_was_evaluated(run: Run) -> Iterator[RuleViolation]:
    """load_best_model_at_end is used only with full fine-tuning, and only if every checkpoint is
    evaluated.

    A LoRA run ends with its last adapter. runtime.keep_best also keeps the best checkpoints, and
    `toolkit export --checkpoint` exports one of them. With full fine-tuning, set
    `save_strategy: best`, or give save_strategy and eval_strategy the same value. If this value is
    `steps`, save_steps must be a multiple of eval_steps.
    """
    if not run.value(_BEST):
        return
    if not run.get("model.full_finetuning"):
        yield RuleViolation(
            _BEST,
            "has no effect in a LoRA run, which always ends with its last adapter",
            notes=(
                "runtime.keep_best: 1 keeps the best checkpoint, and toolkit export --checkpoint "
                "exports it",
            ),
            fixes=(run.set_fix(_BEST, False),),
        )
        return
    if run.value(_SAVE) == "best":
        return
    if run.value(_EVAL) != run.value(_SAVE):
        has_data = (
            run.get("dataset.eval_path") is not None or run.get("dataset.eval_split") is not None
        )
        # without evaluation data, DATA005 would refuse the second fix
        evaluation_fix = (run.set_fix(_EVAL, run.value(_SAVE)),) if has_data else ()
        yield RuleViolation(
            _BEST,
            "checkpoints that are not evaluated cannot be compared",
            notes=(f"{run.describe(_EVAL)}; {run.describe(_SAVE)}",),
            fixes=(run.set_fix(_BEST, False), *evaluation_fix),
            related=(_EVAL, _SAVE),
        )
        return
    # Without eval_steps transformers uses logging_steps, which is 1 here.
    save_steps, eval_steps = run.value(_SAVE_STEPS), run.value(_EVAL_STEPS) or 1
    if run.value(_EVAL) != "steps" or save_steps % eval_steps == 0:
        return
    are_fractions = save_steps < 1 and eval_steps < 1
    if are_fractions and (save_steps * _MILLIONTHS) % (eval_steps * _MILLIONTHS) == 0:
        return
    yield RuleViolation(
        _SAVE_STEPS,
        f"{save_steps} is not a multiple of eval_steps ({eval_steps})",
        notes=(f"{run.describe(_EVAL_STEPS)}; {run.describe(_BEST)}",),
        fixes=(run.set_fix(_SAVE_STEPS, eval_steps), run.set_fix(_EVAL_STEPS, save_steps)),
        related=(_EVAL_STEPS, _BEST),
    )


@rule(
    "GRPO025",
    f"{_SCHEDULER} {_EVAL}",
    example="grpo:\n  lr_scheduler_type: reduce_lr_on_plateau",
    fix="eval_strategy: steps",
)
def plateau_needs_evaluation(run: Run) -> Iterator[RuleViolation]:
    """The schedules reduce_lr_on_plateau and greedy (lr_scheduler_type) need eval_strategy.

    These schedules change the learning rate according to an evaluation metric, so they need
    evaluations.
    """
    schedule = run.value(_SCHEDULER)
    if schedule in ("reduce_lr_on_plateau", "greedy") and run.value(_EVAL) == "no":
        yield RuleViolation(
            _SCHEDULER,
            f"the schedule {schedule} needs evaluations, but there are none",
            notes=(run.describe(_EVAL),),
            fixes=(run.set_fix(_SCHEDULER, "linear"),),
            related=(_EVAL,),
        )


@rule(
    "GRPO026",
    "grpo.dataloader_prefetch_factor grpo.dataloader_num_workers",
    example="grpo:\n  dataloader_prefetch_factor: 2",
    fix="dataloader_num_workers: 1",
)
def prefetch_needs_workers(run: Run) -> Iterator[RuleViolation]:
    """dataloader_prefetch_factor needs dataloader_num_workers above 0.

    Only a worker process can load data ahead.
    """
    factor = run.value("grpo.dataloader_prefetch_factor")
    if factor is not None and run.value("grpo.dataloader_num_workers") == 0:
        yield RuleViolation(
            "grpo.dataloader_prefetch_factor",
            "without a worker process no data is loaded ahead",
            notes=(run.describe("grpo.dataloader_num_workers"),),
            fixes=(
                run.set_fix("grpo.dataloader_num_workers", 1),
                run.set_fix("grpo.dataloader_prefetch_factor", None),
            ),
            related=("grpo.dataloader_num_workers",),
        )


@rule(
    "GRPO027",
    f"{_EVAL_STEPS} {_SAVE_STEPS}",
    example="grpo:\n  save_steps: 10.5",
    fix="save_steps: 10",
)
def whole_steps_above_one(run: Run) -> Iterator[RuleViolation]:
    """eval_steps and save_steps are whole numbers of steps, or fractions below 1.

    A fraction is a share of the run's steps: 0.1 means after every tenth of the run. 10.5 steps are
    not possible, and with 0 steps nothing is ever saved.
    """
    for key, strategy in ((_EVAL_STEPS, _EVAL), (_SAVE_STEPS, _SAVE)):
        steps = run.get(key)
        if steps is None or run.get(strategy) != "steps":
            continue
        if steps > 1 and steps != int(steps):
            yield RuleViolation(
                key,
                f"{steps} is not a whole number of steps",
                fixes=(run.set_fix(key, int(steps)),),
            )
        elif steps == 0 and key == _SAVE_STEPS:
            off_fix = run.set_fix(strategy, "no")
            message = "with 0 steps no checkpoint is ever saved"
            yield RuleViolation(key, message, fixes=(run.set_fix(key, 500), off_fix))
