"""Detect steps without a training signal. In such a step, no completion got a reward, or the
rewards are equal within every group.

GRPO learns from the differences of rewards within a group. Without differences, all advantages are
0, and the rewards do not change the weights. The metric ``steps_without_signal`` in metrics.jsonl
is the number of consecutive steps without a signal.

There are two warnings, and each is printed at most once. The first warning is printed after a step
in which no completion got a reward. The second warning is printed after
``MAX_STEPS_WITHOUT_SIGNAL`` consecutive steps without a signal. It is also printed at the end of a
run in which no step had a signal, if no warning was printed before.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from toolkit.train.rewards.error_policy import BAD_REWARDS_FILE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

COUNT_METRIC = "steps_without_signal"
MAX_STEPS_WITHOUT_SIGNAL = 20
_TAIL_BYTES = 1 << 16
_MAX_STEPS = 1 << 40


class RewardWatch:
    """Counts consecutive steps without a training signal, and warns about them. ``print_line``
    prints a line on the terminal.
    """

    def __init__(self, run_dir: Path, print_line: Callable[[str], None]) -> None:
        """Read the number of consecutive steps without a training signal from the last row of
        metrics.jsonl. A resumed run continues to count these steps. Raises OSError.
        """
        self.print_line = print_line
        self._bad_rewards = run_dir / BAD_REWARDS_FILE
        self.count = _read_last_count(run_dir / "metrics.jsonl")
        self.printed: set[str] = set()
        self.has_signal = False
        self.last_row: Mapping[str, Any] = {}

    def check_row(self, row: dict[str, Any]) -> None:
        """Check a new row of metrics.jsonl, and warn if needed. If the step has no training signal,
        add the number of consecutive steps without a signal to the row.
        """
        if "loss" not in row or "reward" not in row:
            return  # an evaluation, or a step that trains on the completions of an earlier step
        is_unscored = row["reward"] is None
        has_equal_rewards = row.get("frac_reward_zero_std") == 1
        self.count = self.count + 1 if is_unscored or has_equal_rewards else 0
        self.last_row, self.has_signal = row, self.has_signal or not self.count
        if self.count:
            row[COUNT_METRIC] = self.count
        if is_unscored:
            self._print_once(
                "unscored", unscored_warning(row, _read_last_failure(self._bad_rewards))
            )
        elif self.count >= MAX_STEPS_WITHOUT_SIGNAL:
            self._print_once("flat", equal_rewards_warning(row, self.count))

    def finish(self) -> None:
        """At the end of training, print a warning if no step had a training signal and no warning
        was printed before.
        """
        if self.count and not self.has_signal and not self.printed:
            self._print_once("flat", equal_rewards_warning(self.last_row, self.count))

    def _print_once(self, kind: str, text: str) -> None:
        if kind not in self.printed:
            self.printed.add(kind)
            self.print_line(text)


def unscored_warning(row: Mapping[str, Any], last_failure: str | None) -> str:
    """The warning for a step in which no completion has a reward. ``last_failure`` says how a
    reward function failed, if one failed.
    """
    head = (
        f"warning: step {row['step']}: every reward is None or NaN, so the model learns nothing "
        "from this step.\n"
    )
    if last_failure is not None:
        return (
            f"{head}  likely cause: {last_failure} (reward.on_error: none)\n  what to do: correct "
            f"the reward function. {BAD_REWARDS_FILE} in the run folder has the completions on "
            "which it failed"
        )
    return (
        f"{head}  likely cause: the reward functions return None for this data\n  what to do: read "
        "completions.jsonl in the run folder, and call the reward functions on one of its "
        "completions"
    )


def _read_last_failure(path: Path) -> str | None:
    """Return how a reward function failed last, according to the last row of the file ``path``
    (bad_rewards.jsonl). If the file does not exist, return None.
    """
    if not path.is_file():
        return None
    try:
        row = json.loads(_last_lines(path)[-1])
        return f"the reward {row['reward']} {row['problem']}"
    except (IndexError, KeyError, TypeError, ValueError):  # for example, a very long row
        return "a reward function fails"


def _last_lines(path: Path) -> list[str]:
    """Return the lines at the end of a file. The first of them may be incomplete."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        return file.read().decode("utf-8", "replace").splitlines()


def equal_rewards_warning(row: Mapping[str, Any], count: int) -> str:
    """The warning for ``count`` consecutive steps in which all rewards of each group were equal."""
    facts = [f"reward {_reward_text(row.get('reward'))} on average"]
    if row.get("completions/clipped_ratio") is not None:
        share = 100 * row["completions/clipped_ratio"]
        facts.append(f"{share:.0f}% of completions cut at grpo.max_completion_length")
    return (
        f"warning: for {_steps_text(count)} all completions of each prompt had the same reward, "
        f"so the model learns nothing from the rewards.\n  step {row['step']}: {', '.join(facts)}\n"
        "  likely causes: the task is too hard or too easy for the model; the reward cannot read "
        "the answers (wrong format, or cut at the limit); the completions are too similar\n  what "
        "to do: read completions.jsonl in the run folder; then change the data or the reward, "
        "raise grpo.num_generations, grpo.temperature or grpo.max_completion_length"
    )


def _steps_text(count: int) -> str:
    return f"{count} steps in a row" if count > 1 else "one step"


def _reward_text(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, (int, float)) else "-"


def _read_last_count(path: Path) -> int:
    """The number ``steps_without_signal`` in the last training row of metrics.jsonl, or 0."""
    if not path.is_file():
        return 0
    lines = _last_lines(path)
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "loss" in row and "reward" in row:
            count = row.get(COUNT_METRIC, 0)
            return count if isinstance(count, int) and 0 <= count < _MAX_STEPS else 0
    return 0
