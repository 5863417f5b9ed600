"""The metric names in metrics.jsonl that the run itself uses. A reward cannot use these names for
its own metrics.

This module does not import torch, because the reward worker process imports this module.
"""

from __future__ import annotations

LEADING_METRICS = (
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
"""The first metrics of a row of metrics.jsonl, in this order."""
RENAMED_METRICS = {"completions/mean_length": "completion_length"}
WALL_CLOCK_METRICS = ("step_time", "runtime", "samples_per_second", "steps_per_second")
_OWN = {
    *LEADING_METRICS,
    *RENAMED_METRICS,
    *WALL_CLOCK_METRICS,
    "epoch",
    "skipped",
    "train_runtime",
}
_OWN_STARTS = ("eval_", "eval/", "sampling/", "timing/")


def refuse_run_metric(name: str) -> None:
    """Raise ValueError if a reward logs a metric under a ``name`` that the run itself uses."""
    start = next((start for start in _OWN_STARTS if name.startswith(start)), None)
    if name in _OWN or start is not None:
        used = f"names that begin with {start}" if start else f"the name {name}"
        raise ValueError(f"log_metric: the run itself uses {used}. Use another name")
