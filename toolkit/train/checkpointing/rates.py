"""Learning rates and the optimizer's other settings, where a run resumes with changed ones.

torch restores a param group and a scheduler whole: the settings of the checkpoint would win over
those of the run file, although the run file says in ``runtime.allow_changed`` that they change. So
what the run file asks for is kept before and put back after. Where nothing changed, the values are
the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SETTINGS = frozenset(
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
"""What a param group holds of the run file's. The schedule decides ``lr``, and some optimizers keep
their progress there too (schedule-free ones, Prodigy): that is the checkpoint's.
"""


@dataclass(frozen=True)
class Asked:
    """What the run file asks for: the settings of each param group, and its rate without a
    schedule.
    """

    groups: list[dict[str, Any]]
    base_lrs: list[float]


def asked(trainer: Any) -> Asked:
    """The settings of the optimizer and the scheduler that ``trainer`` has just made."""
    optimizer, scheduler = _inner(trainer)
    groups = [
        {key: value for key, value in group.items() if key in SETTINGS}
        for group in optimizer.param_groups
    ]
    return Asked(groups, [float(rate) for rate in getattr(scheduler, "base_lrs", [])])


def apply(trainer: Any, wanted: Asked) -> None:
    """Put back ``wanted`` once the state of a checkpoint has been loaded; the next step has the
    rate that the schedule gives from there.
    """
    optimizer, scheduler = _inner(trainer)
    pairs = list(zip(optimizer.param_groups, wanted.groups, strict=True))
    for group, settings in pairs:
        before, now = group.get("initial_lr"), settings.get("initial_lr")
        group.update(settings)
        if before and now is not None and before != now and not _has_lambdas(scheduler):
            group["lr"] *= now / before  # a schedule that follows the run, not the step
    if wanted.base_lrs:
        scheduler.base_lrs = list(wanted.base_lrs)
    if _has_lambdas(scheduler):
        step = scheduler.last_epoch
        rates = [
            base * one(step)
            for base, one in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        for (group, _), rate in zip(pairs, rates, strict=True):
            if hasattr(group["lr"], "fill_"):  # a tensor, which compiled optimizers keep
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        scheduler._last_lr = rates


def _has_lambdas(scheduler: Any) -> bool:
    return bool(getattr(scheduler, "lr_lambdas", None))


def _inner(trainer: Any) -> tuple[Any, Any]:
    """torch's own optimizer and scheduler, inside accelerate's wrappers."""
    optimizer, scheduler = trainer.optimizer, trainer.lr_scheduler
    return getattr(optimizer, "optimizer", optimizer), getattr(scheduler, "scheduler", scheduler)
