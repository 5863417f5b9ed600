"""Rules on how completions are sampled, and on the importance sampling that corrects for
differences between the engine's and the trainer's log-probabilities.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.config.finding import Severity
from toolkit.config.rules.violation import RuleViolation, rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toolkit.config.rules.run import Run

_MAX = "grpo.vllm_importance_sampling_clip_max"
_MIN = "grpo.vllm_importance_sampling_clip_min"
_MODE = "grpo.vllm_importance_sampling_mode"
_CORRECTION = "grpo.vllm_importance_sampling_correction"
_LEVEL = "grpo.importance_sampling_level"
_TOKEN_SUM_LOSSES = ("bnpo", "dr_grpo", "dapo", "cispo")

# key -> (its legal range as text, a test of a value, the nearest legal value to a value)
_RANGES: dict[str, tuple[str, Any, Any]] = {
    "grpo.temperature": ("from 0 to 2", lambda value: 0 <= value <= 2, lambda _: 1.0),
    "grpo.top_p": ("more than 0 and at most 1", lambda value: 0 < value <= 1, lambda _: 1.0),
    "grpo.top_k": ("at least -1 (0 or -1: all tokens)", lambda value: value >= -1, lambda _: 0),
    "grpo.min_p": ("from 0 to 1", lambda value: 0 <= value <= 1, lambda value: float(value > 1)),
}


@rule(
    "GRPO008",
    f"{_MIN} {_MAX}",
    example="grpo:\n  vllm_importance_sampling_clip_min: 4.0\n  num_generations: 8",
    fix="vllm_importance_sampling_clip_min: 0.5",
)
def clip_order(run: Run) -> Iterator[RuleViolation]:
    """vllm_importance_sampling_clip_min is below vllm_importance_sampling_clip_max.

    Importance ratios are limited to the interval from clip_min to clip_max, so the interval must
    not be empty.
    """
    low, high = run.value(_MIN), run.value(_MAX)
    if low is None or high is None or low < high:
        return
    fixes = [run.set_fix(_MAX, float(low) * 2 or 1.0), run.set_fix(_MIN, float(high) / 2)]
    yield RuleViolation(
        _MIN,
        f"{low} is not below vllm_importance_sampling_clip_max {high}",
        notes=(f"{run.describe(_MIN)}; {run.describe(_MAX)}",),
        fixes=tuple(sorted(fixes, key=lambda fix: not fix.edits)),
        related=(_MAX,),
    )


@rule(
    "GRPO009",
    f"{_MODE} {_MIN} {_MAX}",
    example="""
grpo:
  vllm_importance_sampling_mode: token_truncate
  vllm_importance_sampling_clip_max: null
""",
    fix="vllm_importance_sampling_clip_max: 3.0",
)
def truncation_needs_a_bound(run: Run) -> Iterator[RuleViolation]:
    """A *_truncate mode of vllm_importance_sampling_mode needs
    vllm_importance_sampling_clip_min or vllm_importance_sampling_clip_max.

    Truncation without a bound has no effect.
    """
    if not run.value(_CORRECTION) or not str(run.value(_MODE)).endswith("_truncate"):
        return
    if run.value(_MIN) is None and run.value(_MAX) is None:
        yield RuleViolation(
            _MODE,
            f"{run.value(_MODE)} needs a bound, but both clip_min and clip_max are null",
            notes=(f"{run.describe(_MIN)}; {run.describe(_MAX)}",),
            fixes=(run.set_fix(_MAX, 3.0),),
            related=(_MAX, _MIN),
        )


@rule(
    "GRPO016",
    f"grpo.loss_type {_MODE}",
    example="grpo:\n  loss_type: vespo\n  vllm_importance_sampling_mode: sequence_mask",
    fix="vllm_importance_sampling_mode: token_truncate",
)
def vespo_per_token(run: Run) -> Iterator[RuleViolation]:
    """loss_type: vespo needs vllm_importance_sampling_mode: token_truncate or token_mask.

    VESPO weights whole sequences itself, so the correction of the engine's log-probabilities must
    be one ratio per token. The default mode is sequence_mask.
    """
    if run.value("grpo.loss_type") != "vespo" or not run.value(_CORRECTION):
        return
    mode = run.value(_MODE)
    if run.engine == "transformers" or mode in ("token_truncate", "token_mask"):
        return
    yield RuleViolation(
        "grpo.loss_type",
        f"vespo needs vllm_importance_sampling_mode token_truncate or token_mask, not {mode}",
        notes=(run.describe(_MODE),),
        fixes=(run.set_fix(_MODE, "token_truncate"),),
        related=(_MODE,),
    )


@rule(
    "GRPO017",
    f"{_LEVEL} grpo.loss_type",
    example="grpo:\n  importance_sampling_level: sequence\n  loss_type: dapo",
    fix="loss_type: grpo",
    severity=Severity.WARNING,
)
def sequence_level_losses(run: Run) -> Iterator[RuleViolation]:
    """importance_sampling_level: sequence needs a loss that averages over sequences.

    The losses bnpo, dr_grpo, dapo and cispo sum over tokens, so with importance_sampling_level:
    sequence they weight each sequence by its length. For GSPO (arXiv 2507.18071) set loss_type:
    grpo.
    """
    loss = run.value("grpo.loss_type")
    if run.value(_LEVEL) == "sequence" and loss in _TOKEN_SUM_LOSSES:
        yield RuleViolation(
            _LEVEL,
            f"with the value sequence, loss_type {loss} weights each sequence by its length",
            notes=(run.describe("grpo.loss_type"),),
            fixes=(run.set_fix("grpo.loss_type", "grpo"), run.set_fix(_LEVEL, "token")),
            related=("grpo.loss_type",),
        )


@rule(
    "GRPO021",
    "grpo.temperature",
    example="grpo:\n  temperature: 0.0",
    fix="temperature: 1.0",
)
def no_greedy_training(run: Run) -> Iterator[RuleViolation]:
    """temperature is above 0 in training.

    At 0 every completion of a prompt is the same, every advantage is 0, and nothing is learned.
    """
    if run.value("grpo.temperature") == 0:
        yield RuleViolation(
            "grpo.temperature",
            "at temperature 0 all completions of a prompt are the same, so every advantage is 0",
            fixes=(run.set_fix("grpo.temperature", 1.0),),
        )


@rule(
    "GRPO022",
    " ".join(_RANGES),
    example="grpo:\n  top_p: 1.5",
    fix="top_p: 1.0",
)
def sampling_ranges(run: Run) -> Iterator[RuleViolation]:
    """temperature, top_p, top_k and min_p are in range.

    temperature is from 0 to 2. top_p is above 0 and at most 1. top_k is at least -1, and its values
    0 and -1 both keep all tokens. min_p is from 0 to 1.
    """
    for key, (range_text, is_in_range, nearest_legal) in _RANGES.items():
        node = run.node(key)
        if node is None or type(node.value) not in (int, float) or is_in_range(node.value):
            continue
        if node.value != node.value:
            continue
        yield RuleViolation(
            key,
            f"{node.value} is out of range: it must be {range_text}",
            fixes=(run.set_fix(key, nearest_legal(node.value)),),
        )
