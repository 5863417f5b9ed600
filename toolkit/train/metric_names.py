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
_RUN_METRICS = {
    *LEADING_METRICS,
    *RENAMED_METRICS,
    *WALL_CLOCK_METRICS,
    "epoch",
    "skipped",
    "train_runtime",
}
_RUN_METRIC_PREFIXES = ("eval_", "eval/", "sampling/", "timing/")


def refuse_run_metric(name: str) -> None:
    """Raise ValueError if a reward logs a metric under a ``name`` that the run itself uses."""
    prefix = next((prefix for prefix in _RUN_METRIC_PREFIXES if name.startswith(prefix)), None)
    if name in _RUN_METRICS or prefix is not None:
        used = f"names that begin with {prefix}" if prefix else f"the name {name}"
        raise ValueError(f"log_metric: the run itself uses {used}. Use another name")
