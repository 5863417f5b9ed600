"""Rules on evaluation during training: its data, its metrics, and the settings that depend on
them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.base.did_you_mean import nearest
from toolkit.config.finding import Severity
from toolkit.config.reward_table import reward_metric_names
from toolkit.config.rules.violation import RuleViolation, rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toolkit.config.rules.run import Run

METRIC = "grpo.metric_for_best_model"
_STRATEGY, _SAVE, _BEST = "grpo.eval_strategy", "grpo.save_strategy", "grpo.load_best_model_at_end"
_ON_START, _SCHEDULER = "grpo.eval_on_start", "grpo.lr_scheduler_type"
METRIC_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
"""Learning rate schedules that depend on the metric."""
METRICS = (
    "loss", "reward", "reward_std", "frac_reward_zero_std", "entropy", "num_tokens",
    "completions/mean_length", "completions/min_length", "completions/max_length",
    "completions/clipped_ratio", "completions/mean_terminated_length",
    "completions/min_terminated_length", "completions/max_terminated_length",
    "clip_ratio/low_mean", "clip_ratio/low_min", "clip_ratio/high_mean", "clip_ratio/high_max",
    "clip_ratio/region_mean", "runtime", "samples_per_second", "steps_per_second",
)  # fmt: skip
"""Metrics of every GRPO evaluation, besides the rewards and the metrics that user code logs."""
CONDITIONAL_METRICS = (
    "kl", "aux_loss", "entropy_coef", "policy_loss", "cispo_clip_ratio", "vespo/phi_seq_mean",
    "sampling/logp_gap_mean", "sampling/logp_gap_max", "sampling/sampling_logp_difference/mean",
    "sampling/sampling_logp_difference/max", "sampling/importance_sampling_ratio/min",
    "sampling/importance_sampling_ratio/mean", "sampling/importance_sampling_ratio/max",
    "tools/call_frequency", "tools/failure_frequency", "epoch", "model_preparation_time",
)  # fmt: skip
"""Metrics that exist only with some losses, options or engines."""
# metric name in metrics.jsonl -> the trainer's name of the same metric, if it differs
_TRAINER_METRIC_NAMES = {"completion_length": "completions/mean_length"}


def has_evaluation_data(run: Run) -> bool:
    """Whether the run file names data to evaluate on."""
    keys = ("dataset.eval_path", "dataset.eval_split", "environment.eval_size")
    return any(run.get(key) is not None for key in keys)


@rule(
    "GRPO040",
    f"{METRIC} {_STRATEGY} {_BEST} {_SAVE} {_SCHEDULER}",
    example="grpo:\n  eval_strategy: steps\n  metric_for_best_model: accuracy",
    fix="metric_for_best_model: reward",
)
def best_metric_exists(run: Run) -> Iterator[RuleViolation]:
    """metric_for_best_model is a metric of the evaluation.

    transformers looks for this metric after each evaluation, and the run fails if the metric is
    missing. The metrics are reward, reward_std, loss, rewards/NAME/mean for each reward function,
    and others. The prefix eval_ is optional. Your own reward functions can log further metrics
    (log_metric), so with such functions the finding is a warning.
    """
    metric = run.value(METRIC)
    if not metric or run.get(_STRATEGY) == "no":
        return
    name = metric.removeprefix("eval_")
    rewards, only_builtins = _reward_metric_names(run)
    metrics = (
        *METRICS,
        *(f"rewards/{reward}/{statistic}" for reward in rewards for statistic in ("mean", "std")),
    )
    if name in metrics or name in CONDITIONAL_METRICS:
        return
    bare_name = name.removeprefix("eval/")
    suggestion = (
        _TRAINER_METRIC_NAMES.get(bare_name)
        or (bare_name if bare_name in metrics else nearest(bare_name, metrics))
        or "reward"
    )
    yield RuleViolation(
        METRIC,
        f"the evaluation has no metric {metric}",
        notes=(f"its metrics: {', '.join((*metrics[:4], *metrics[len(METRICS) :]))} and others",),
        fixes=(run.set_fix(METRIC, suggestion),),
        # A name from metrics.jsonl (eval/reward) is never a metric of the trainer, even if reward
        # functions log metrics.
        severity=None if only_builtins or name != bare_name else Severity.WARNING,
    )


@rule(
    "GRPO041",
    f"{_SAVE} {_BEST} {METRIC} {_STRATEGY}",
    example="grpo:\n  save_strategy: best",
    fix="save_strategy: steps",
)
def best_has_a_metric(run: Run) -> Iterator[RuleViolation]:
    """save_strategy: best needs eval_strategy and metric_for_best_model.

    An evaluation metric decides which checkpoint is the best. Without evaluations no checkpoint is
    ever saved. If metric_for_best_model is not set, load_best_model_at_end: true selects the loss
    as the metric. The loss of GRPO is a poor measure of quality.
    """
    if run.value(_SAVE) != "best":
        return
    if run.value(_STRATEGY) == "no":
        yield RuleViolation(
            _SAVE,
            "best saves a checkpoint only after an evaluation, and this run has no evaluations",
            notes=(run.describe(_STRATEGY),),
            fixes=(run.set_fix(_SAVE, "steps"),),
            related=(_STRATEGY,),
        )
    elif run.value(METRIC) is None and not run.value(_BEST) and not _schedule_uses_metric(run):
        yield RuleViolation(
            _SAVE,
            "best needs metric_for_best_model",
            notes=(run.describe(METRIC),),
            fixes=(run.set_fix(METRIC, "reward"), run.set_fix(_SAVE, "steps")),
            related=(METRIC,),
        )


def _reward_metric_names(run: Run) -> tuple[list[str], bool]:
    """Return two values: the names that the reward functions have in the metrics, and whether all
    of the functions are built in.
    """
    node = run.node("reward.functions")
    items = node.value if node is not None and isinstance(node.value, list) else []
    name_nodes = [item.value.get("name") for item in items if isinstance(item.value, dict)]
    names = [name.value for name in name_nodes if name is not None and isinstance(name.value, str)]
    return reward_metric_names(names), not any(":" in name for name in names)


def _schedule_uses_metric(run: Run) -> bool:
    """Whether the learning rate schedule depends on an evaluation metric. If metric_for_best_model
    is not set, such a schedule uses a default metric of transformers.
    """
    return run.get(_SCHEDULER) in METRIC_SCHEDULES


@rule(
    "GRPO042",
    f"{_ON_START} dataset.eval_path dataset.eval_split",
    example="grpo:\n  eval_on_start: true",
    fix="eval_on_start: false",
)
def first_evaluation_has_data(run: Run) -> Iterator[RuleViolation]:
    """eval_on_start needs dataset.eval_path, dataset.eval_split or environment.eval_size.

    Without one of these keys there is no data to evaluate on.
    """
    if run.value(_ON_START) and not has_evaluation_data(run):
        yield RuleViolation(
            _ON_START,
            "there is no data to evaluate on",
            notes=(f"{run.describe('dataset.eval_path')}; {run.describe('dataset.eval_split')}",),
            fixes=(run.set_fix(_ON_START, False),),
        )
