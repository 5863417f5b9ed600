"""The names in metrics.jsonl that belong to the run, which a reward cannot log under.

A light module: the worker of the rewards imports it, and needs no torch for it.
"""

from __future__ import annotations

LEADING = (
    "step",
    "reward",
    "reward_std",
    "loss",
    "kl",
    "entropy",
    "completion_length",
    "grad_norm",
    "learning_rate",
)
"""The first names of a row, in this order."""
RENAMED = {"completions/mean_length": "completion_length"}
WALL_CLOCK = ("step_time", "runtime", "samples_per_second", "steps_per_second")
_OWN = {*LEADING, *RENAMED, *WALL_CLOCK, "epoch", "skipped", "train_runtime"}
_OWN_STARTS = ("eval_", "eval/", "sampling/", "timing/")


def refuse_own(name: str) -> None:
    """Raise ValueError if a reward cannot log a metric under ``name``, because the run logs its own
    value there, or reads the name.
    """
    start = next((start for start in _OWN_STARTS if name.startswith(start)), None)
    if name in _OWN or start is not None:
        what = f"names that begin with {start} belong" if start else f"the name {name} belongs"
        raise ValueError(f"log_metric: {what} to the run; log the value under another name")
