"""Keep changed learning rates and other optimizer settings when a run resumes.

When torch loads a checkpoint, it restores all settings of a param group and a scheduler. So the old
settings would replace the settings in the run file, although ``runtime.allow_changed`` allows the
change. Therefore the settings from the run file are saved before the checkpoint is loaded, and
restored afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

RUN_FILE_SETTINGS = frozenset(
    {
        "initial_lr",
        "weight_decay",
        "betas",
        "eps",
        "momentum",
        "dampening",
        "nesterov",
        "alpha",
        "clip_threshold",
        "decay_rate",
    }
)
"""The entries of a param group that come from the run file. Other entries come from the checkpoint.
These are ``lr``, which the schedule sets, and the progress that some optimizers keep in the param
group (schedule-free optimizers, Prodigy).
"""


@dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer and scheduler settings of the run file: the settings of each param group, and
    the learning rate of each group before the schedule scales it.
    """

    groups: list[dict[str, Any]]
    base_lrs: list[float]


def read_settings(trainer: Any) -> OptimizerSettings:
    """Return the settings of the optimizer and the scheduler of ``trainer``. Call this function
    before a checkpoint is loaded.
    """
    optimizer, scheduler = _unwrapped(trainer)
    groups = [
        {key: value for key, value in group.items() if key in RUN_FILE_SETTINGS}
        for group in optimizer.param_groups
    ]
    return OptimizerSettings(groups, [float(rate) for rate in getattr(scheduler, "base_lrs", [])])


def restore_settings(trainer: Any, run_settings: OptimizerSettings) -> None:
    """Restore the settings ``run_settings`` of the run file. Call this function after a checkpoint
    was loaded, because loading replaces these settings. The next step then has the learning rate
    that the schedule of the run file gives for that step.
    """
    optimizer, scheduler = _unwrapped(trainer)
    pairs = list(zip(optimizer.param_groups, run_settings.groups, strict=True))
    for group, settings in pairs:
        before, now = group.get("initial_lr"), settings.get("initial_lr")
        group.update(settings)
        if before and now is not None and before != now and not _has_lambdas(scheduler):
            group["lr"] *= now / before  # this schedule does not compute the rate from the step
    if run_settings.base_lrs:
        scheduler.base_lrs = list(run_settings.base_lrs)
    if _has_lambdas(scheduler):
        step = scheduler.last_epoch
        rates = [
            base * factor_at(step)
            for base, factor_at in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        for (group, _), rate in zip(pairs, rates, strict=True):
            if hasattr(group["lr"], "fill_"):  # a tensor, which compiled optimizers keep
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        scheduler._last_lr = rates


def _has_lambdas(scheduler: Any) -> bool:
    return bool(getattr(scheduler, "lr_lambdas", None))


def _unwrapped(trainer: Any) -> tuple[Any, Any]:
    """Return torch's optimizer and scheduler, without accelerate's wrappers."""
    optimizer, scheduler = trainer.optimizer, trainer.lr_scheduler
    return getattr(optimizer, "optimizer", optimizer), getattr(scheduler, "scheduler", scheduler)
