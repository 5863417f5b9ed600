"""Choose the curves of a run from its metrics and timings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.base.formatting import GIB
from toolkit.train.report.chart import Chart, Line
from toolkit.train.report.log_files import finite_number, metric_column

if TYPE_CHECKING:
    from toolkit.train.report.axis import Values
    from toolkit.train.report.log_files import RunFiles

MAX_REWARD_LINES = 6
# Each row: title, note, then (label, possible names of the metric) per line. A chart is drawn if
# any of its lines has a value.
_METRIC_CHARTS: list[tuple[str, str, list[tuple[str, tuple[str, ...]]]]] = [
    ("KL to the base model", "nats per token", [("kl", ("kl",))]),
    (
        "Entropy",
        "nats per token; with an entropy near 0 the model does not explore",
        [("entropy", ("entropy",))],
    ),
    (
        "Loss",
        "the loss of GRPO is near 0 by construction: watch the reward instead",
        [("loss", ("loss",))],
    ),
    (
        "Engine and trainer",
        "difference of their log-probabilities, nats per token",
        [
            ("mean", ("sampling/logp_gap_mean", "sampling/sampling_logp_difference/mean")),
            ("largest", ("sampling/logp_gap_max", "sampling/sampling_logp_difference/max")),
        ],
    ),
    (
        "Groups without training signal",
        "share of groups in which all completions have the same reward",
        [
            ("share", ("frac_reward_zero_std",)),
            ("completions not trained on", ("packing/skipped_rows",)),
        ],
    ),
    (
        "Dynamic sampling",
        "share of groups in which all completions have the same reward",
        [
            ("before replacement", ("dynamic_sampling/no_spread_before",)),
            ("after replacement", ("dynamic_sampling/no_spread_after",)),
        ],
    ),
    (
        "Completions drawn and not trained on",
        "per generation, from groups that dynamic sampling replaced",
        [("completions", ("dynamic_sampling/discarded_completions",))],
    ),
    (
        "Curriculum",
        "shares of prompts",
        [
            ("share of the dataset that was drawn so far", ("curriculum/measured_share",)),
            ("share of the batch that was drawn before", ("curriculum/repeated_share",)),
        ],
    ),
    (
        "Difficulty of chosen prompts",
        "standard deviation of a prompt's earlier rewards; the curriculum prefers large values",
        [
            ("prompts chosen again", ("curriculum/expected_spread",)),
            ("all prompts drawn so far", ("curriculum/mean_spread",)),
        ],
    ),
    (
        "Truncated completions",
        "share of completions that reached max_completion_length",
        [("share", ("completions/clipped_ratio",))],
    ),
    ("Gradient norm", "before clipping", [("norm", ("grad_norm",))]),
    ("Learning rate", "", [("rate", ("learning_rate",))]),
]
_PHASES = (
    ("rollout", "rollout_s"),
    ("reward", "reward_s"),
    ("train", "train_s"),
    ("publish", "publish_s"),
)


def reward_chart(run: RunFiles) -> Chart | None:
    """Return the main chart. It shows the mean reward, a band of one standard deviation around it,
    and evaluations as marks.

    None if no reward was logged.
    """
    rewards = metric_column(run.metrics, "reward")
    if not _has_values(rewards):
        return None
    spreads = metric_column(run.metrics, "reward_std")
    pairs = list(zip(rewards, spreads, strict=True))
    low: Values = [None if r is None or s is None else r - s for r, s in pairs]
    high: Values = [None if r is None or s is None else r + s for r, s in pairs]
    evaluated = [(float(row["step"]), finite_number(row.get("eval/reward"))) for row in run.evals]
    return Chart(
        title="Reward",
        note="mean over each step's completions; the band is the mean ± one standard deviation",
        xs=_steps(run.metrics),
        lines=[Line(label="mean", values=rewards)],
        band=(low, high) if _has_values(low) else None,
        dots=[(step, value) for step, value in evaluated if value is not None],
        dots_label="held-out prompts",
        wide=True,
    )


def other_charts(run: RunFiles) -> list[Chart]:
    """Return all other charts that have values. The most important chart comes first."""
    charts = [_reward_functions_chart(run), _length_chart(run)]
    xs = _steps(run.metrics)
    for title, note, line_specs in _METRIC_CHARTS:
        lines = [
            Line(label=label, values=metric_column(run.metrics, *names), tone=tone)
            for tone, (label, names) in enumerate(line_specs, start=1)
        ]
        lines = [line for line in lines if _has_values(line.values)]
        exact = title == "Learning rate"
        chart = Chart(title=title, note=note, xs=xs, lines=lines, exact=exact) if lines else None
        charts.append(chart)
    return [chart for chart in [*charts, *_timing_charts(run)] if chart is not None]


def _reward_functions_chart(run: RunFiles) -> Chart | None:
    names = sorted({key for row in run.metrics for key in row if _is_reward_mean(key)})
    if len(names) < 2:
        return None
    lines = [
        Line(
            label=name.removeprefix("rewards/").removesuffix("/mean"),
            values=metric_column(run.metrics, name),
            tone=tone,
        )
        for tone, name in enumerate(names[:MAX_REWARD_LINES], start=1)
    ]
    omitted_note = (
        f", {len(names) - MAX_REWARD_LINES} more not shown" if len(names) > MAX_REWARD_LINES else ""
    )
    note = f"mean of each reward function before it is multiplied by its weight{omitted_note}"
    return Chart(title="Reward functions", note=note, xs=_steps(run.metrics), lines=lines)


def _is_reward_mean(key: str) -> bool:
    return key.startswith("rewards/") and key.endswith("/mean")


def _length_chart(run: RunFiles) -> Chart | None:
    mean = metric_column(run.metrics, "completion_length", "completions/mean_length")
    if not _has_values(mean):
        return None
    low = metric_column(run.metrics, "completions/min_length")
    high = metric_column(run.metrics, "completions/max_length")
    return Chart(
        title="Completion length",
        note="tokens"
        + (
            "; the band goes from the shortest to the longest"
            if _has_values(low) and _has_values(high)
            else ""
        ),
        xs=_steps(run.metrics),
        lines=[Line(label="mean", values=mean)],
        band=(low, high) if _has_values(low) and _has_values(high) else None,
    )


def _timing_charts(run: RunFiles) -> list[Chart]:
    xs = _steps(run.timings)
    phases = [
        Line(label=label, values=metric_column(run.timings, name), tone=tone)
        for tone, (label, name) in enumerate(_PHASES, start=1)
    ]
    phases = [line for line in phases if _has_values(line.values)]
    step_times = metric_column(run.timings, "step_s")
    charts = []
    if phases:
        note = "seconds, by phase"
        charts.append(Chart(title="Step time", note=note, xs=xs, lines=phases, stacked=True))
    elif _has_values(step_times):
        line = Line(label="step", values=step_times)
        charts.append(Chart(title="Step time", note="seconds", xs=xs, lines=[line]))
    speed = metric_column(run.timings, "tokens_per_s")
    if _has_values(speed):
        line = Line(label="tokens/s", values=speed)
        note = "completion tokens per second, over the whole step"
        charts.append(Chart(title="Throughput", note=note, xs=xs, lines=[line]))
    memory_gib: Values = [
        None if value is None else value / GIB
        for value in metric_column(run.timings, "peak_memory_bytes")
    ]
    if _has_values(memory_gib):
        line = Line(label="GiB", values=memory_gib)
        charts.append(Chart(title="Peak memory", note="GiB", xs=xs, lines=[line], exact=True))
    return charts


def _steps(rows: list[dict[str, Any]]) -> list[float]:
    return [float(row["step"]) for row in rows]


def _has_values(values: Values) -> bool:
    return any(value is not None for value in values)
