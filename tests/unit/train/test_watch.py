"""Steps without a reward signal are counted in the metrics, and reported once."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from toolkit.train.report.reward_watch import COUNT_METRIC, MAX_STEPS_WITHOUT_SIGNAL, RewardWatch

if TYPE_CHECKING:
    from pathlib import Path


def row(step: int, reward: float | None, share_without_spread: float) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 0.0,
        "reward": reward,
        "frac_reward_zero_std": share_without_spread,
    }


def test_equal_rewards_for_many_steps_are_reported_once(tmp_path: Path) -> None:
    printed: list[str] = []
    watch = RewardWatch(tmp_path, printed.append)
    rows = [row(step, 0.0, 1.0) for step in range(1, 2 * MAX_STEPS_WITHOUT_SIGNAL + 1)]
    for number, one in enumerate(rows, start=1):
        watch.check_row(one)
        assert len(printed) == (number >= MAX_STEPS_WITHOUT_SIGNAL)
        assert one[COUNT_METRIC] == number
    assert f"for {MAX_STEPS_WITHOUT_SIGNAL} steps in a row" in printed[0]
    assert f"step {MAX_STEPS_WITHOUT_SIGNAL}: reward 0.000 on average" in printed[0]
    assert "what to do: read completions.jsonl" in printed[0]


def test_a_short_run_without_signal_is_reported_at_its_end(tmp_path: Path) -> None:
    printed: list[str] = []
    watch = RewardWatch(tmp_path, printed.append)
    for step in (1, 2):
        watch.check_row(row(step, 0.0, 1.0))
    assert printed == []
    watch.finish()
    assert "for 2 steps in a row all completions of each prompt had the same reward" in printed[0]
    other = RewardWatch(tmp_path, printed.append)
    other.check_row(row(1, 0.5, 0.5))
    other.check_row(row(2, 0.5, 1.0))
    other.finish()
    assert len(printed) == 1


def test_a_failing_reward_is_named_in_the_warning(tmp_path: Path) -> None:
    printed: list[str] = []
    RewardWatch(tmp_path, printed.append).check_row(row(1, None, 1.0))
    assert "likely cause: the reward functions return None for this data" in printed[0]
    bad = tmp_path / "bad_rewards.jsonl"
    bad.write_text('{"reward": "tone", "problem": "returned a str, not a number"}\n')
    RewardWatch(tmp_path, printed.append).check_row(row(1, None, 1.0))
    assert "likely cause: the reward tone returned a str, not a number" in printed[1]
    assert "bad_rewards.jsonl in the run folder has the completions" in printed[1]
    with bad.open("a") as file:
        file.write(json.dumps({"reward": "tone", "problem": "x", "prompt": "y" * 70_000}) + "\n")
    RewardWatch(tmp_path, printed.append).check_row(row(1, None, 1.0))
    assert "likely cause: a reward function fails" in printed[2]


def test_one_group_with_spread_resets_the_count(tmp_path: Path) -> None:
    printed: list[str] = []
    watch = RewardWatch(tmp_path, printed.append)
    for step in range(1, 5 * MAX_STEPS_WITHOUT_SIGNAL):
        one = row(step, 0.5, 0.75 if step % (MAX_STEPS_WITHOUT_SIGNAL - 1) == 0 else 1.0)
        watch.check_row(one)
        assert (COUNT_METRIC in one) == (step % (MAX_STEPS_WITHOUT_SIGNAL - 1) != 0)
    assert printed == []


def test_rewards_that_are_all_none_are_reported_at_once(tmp_path: Path) -> None:
    printed: list[str] = []
    watch = RewardWatch(tmp_path, printed.append)
    for step in (3, 4):
        watch.check_row(row(step, None, 0.0))
    assert len(printed) == 1
    assert printed[0].startswith("warning: step 3: every reward is None or NaN")


def test_evaluations_and_steps_without_new_completions_do_not_count(tmp_path: Path) -> None:
    watch = RewardWatch(tmp_path, lambda _: None)
    evaluation = {"step": 1, "eval/reward": None}
    without = {"step": 2, "loss": 0.1}
    for one in (evaluation, without):
        watch.check_row(one)
        assert COUNT_METRIC not in one


def test_a_resumed_run_continues_the_count(tmp_path: Path) -> None:
    """metrics.jsonl must be the same for an interrupted run and an uninterrupted run."""
    rows = [{**row(1, 0.0, 1.0), COUNT_METRIC: 7}, {"step": 1, "eval/reward": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    watch = RewardWatch(tmp_path, lambda _: None)
    one = row(2, 0.0, 1.0)
    watch.check_row(one)
    assert one[COUNT_METRIC] == 8
