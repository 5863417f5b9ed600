"""If a reward raises, hangs or returns an invalid value, the sample that caused this is found,
saved and reported.
"""

from __future__ import annotations

import asyncio
import re
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from rewards_helpers import COMPLETIONS, reward_scoring_bad_with, run, saved_samples

from toolkit.base.errors import ConfigError
from toolkit.train.rewards import error_policy as policy_module
from toolkit.train.rewards.error_policy import ErrorPolicy, guard
from toolkit.train.rewards.reward_call import is_async


def divide() -> float:
    return 1 / 0


def exit_process() -> float:
    raise SystemExit(3)


def hang() -> float:
    time.sleep(60)
    return 1.0


def spin() -> float:
    while True:
        try:
            sum(range(100))
        except Exception:  # noqa: BLE001 - this reward catches every exception
            continue


def backtrack() -> float:
    return float(bool(re.fullmatch("(a+)+b", "a" * 60)))


RAISED = [(divide, "ZeroDivisionError: division by zero at .*test_rewards_policy.py:\\d+"),
          (exit_process, "SystemExit: 3")]  # fmt: skip
RETURNED = [
    (lambda: float("nan"), "returned nan, which is not a finite 32-bit number"),
    (lambda: float("inf"), "returned inf, which is not a finite"),
    (lambda: 1e39, "returned 1e\\+39, which is not a finite"),
    (lambda: 10**400, "returned 10*\\.\\.\\., which is not a finite 32-bit number"),
    (lambda: "1.0", "returned a str as a reward"),
    (lambda: [1.0], "returned a list as a reward"),
    (lambda: 1j, "returned a complex as a reward"),
    (lambda: np.array([1.0, 2.0]), "returned a ndarray as a reward"),
]


@pytest.mark.parametrize(("score", "message"), RAISED + RETURNED)
def test_fail_reports_function_and_sample_and_saves_the_sample(
    tmp_path: Path, score, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        run(reward_scoring_bad_with(score), tmp_path, "fail")
    assert re.search(rf"reward mine (raised )?{message} ?.*\(sample 1 of 4\)", caught.value.message)
    assert str(tmp_path / "run/bad_rewards.jsonl") in caught.value.message
    assert "on_error: none" in str(caught.value)
    (record,) = saved_samples(tmp_path)
    assert (record["reward"], record["index"]) == ("mine", 1)
    assert (record["prompt"], record["completion"]) == ("p", "bad")
    assert record["columns"] == {"answer": 2}


@pytest.mark.parametrize(("score", "message"), RAISED + RETURNED)
def test_none_scores_the_failing_sample_none_and_counts_it(
    tmp_path: Path, score, message: str
) -> None:
    _, scores, logged = run(reward_scoring_bad_with(score), tmp_path, "none")
    assert scores == [1.0, None, 1.0, 1.0]
    assert logged == {"rewards/mine/failed": 0.25}
    assert [record["index"] for record in saved_samples(tmp_path)] == [1]


@pytest.mark.parametrize("score", [hang, spin, backtrack])
@pytest.mark.parametrize("on_error", ["none", "fail"])
def test_a_hanging_call_is_interrupted(tmp_path: Path, score, on_error: str) -> None:
    started, threads = time.monotonic(), threading.active_count()
    if on_error == "none":
        _, scores, _ = run(reward_scoring_bad_with(score), tmp_path, on_error, 0.4)
        assert scores == [1.0, None, 1.0, 1.0]
    else:
        with pytest.raises(ConfigError, match=r"mine took longer than 0\.4 s \(sample 1 of 4\)"):
            run(reward_scoring_bad_with(score), tmp_path, on_error, 0.4)
    assert time.monotonic() - started < 20
    assert threading.active_count() <= threads


def test_the_search_for_hanging_samples_is_bounded(tmp_path: Path) -> None:
    started = time.monotonic()
    _, scores, logged = run(lambda **kwargs: hang(), tmp_path, "none", 0.1)
    assert scores == [None] * 4
    assert logged == {"rewards/mine/failed": 1.0}
    assert time.monotonic() - started < 0.1 * (1 + policy_module.SEARCH_FACTOR) + 10


def test_wrong_length_of_some_samples(tmp_path: Path) -> None:
    def drops(completions, **kwargs):
        return [1.0 for text in completions if text != "bad"]

    assert run(drops, tmp_path)[1] == [1.0, None, 1.0, 1.0]
    with pytest.raises(ConfigError, match=r"returned 3 rewards for 4 .*\(sample 1 of 4\)"):
        run(drops, tmp_path, "fail")


@pytest.mark.parametrize(
    "function",
    [
        lambda completions, **kwargs: [1.0] * min(len(completions), 3),
        lambda completions, **kwargs: [1.0 / (4 - len(completions))] * len(completions),
    ],
)
def test_if_no_single_sample_fails_the_whole_batch_fails(tmp_path: Path, function) -> None:
    _, scores, logged = run(function, tmp_path)
    assert scores == [None] * 4
    assert logged == {"rewards/mine/failed": 1.0}
    with pytest.raises(ConfigError, match="with the whole batch, but not with any single sample"):
        run(function, tmp_path, "fail")


def test_async_functions_are_async_for_trl_too(tmp_path: Path) -> None:
    async def mine(completions, answer, **kwargs):
        await asyncio.sleep(0.01)
        return [float(value) for value in answer]

    class Judge:
        async def __call__(self, completions, **kwargs):
            return [2.0] * len(completions)

    columns = {"answer": [3]}
    assert guard("mine", mine, ErrorPolicy()).score(["p"], ["c"], **columns) == [3.0]
    assert is_async(mine)
    assert is_async(Judge())
    assert not is_async(divide)
    assert run(mine, tmp_path)[1] == [1.0, 2.0, 3.0, 4.0]
    assert run(Judge(), tmp_path)[1] == [2.0] * 4


@pytest.mark.parametrize("sleep", [asyncio.sleep, time.sleep])
def test_a_hanging_async_call_is_interrupted_even_if_it_blocks_its_loop(
    tmp_path: Path, sleep
) -> None:
    async def mine(completions, **kwargs):
        if "bad" in completions:
            result = sleep(1.5)
            if result is not None:
                await result
        return [1.0] * len(completions)

    started = time.monotonic()
    assert run(mine, tmp_path, "none", 0.4)[1] == [1.0, None, 1.0, 1.0]
    assert time.monotonic() - started < 20


def test_outside_of_training_a_reward_gets_what_trl_passes() -> None:
    def mine(completions, trainer_state, log_metric, log_extra, **kwargs):
        log_metric("x", 1.0)
        log_extra("y", completions)
        return [float(trainer_state.global_step)] * len(completions)

    assert guard("mine", mine, ErrorPolicy()).score(["p"], ["c"], completion_ids=[[1]]) == [0.0]


def test_keyboard_interrupt_is_raised_unchanged(tmp_path: Path) -> None:
    def interrupt() -> float:
        signal.raise_signal(signal.SIGINT)
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        run(reward_scoring_bad_with(interrupt), tmp_path)


def test_a_function_cannot_change_the_arguments_of_the_next_one() -> None:
    def mine(prompts, completions, **kwargs):
        size = len(completions)
        prompts.clear(), completions.clear()
        return [0.0] * size

    prompts, completions = ["p"] * 4, list(COMPLETIONS)
    assert guard("mine", mine, ErrorPolicy("fail"))(prompts, completions) == [0.0] * 4
    assert len(prompts) == 4
    assert completions == COMPLETIONS


def test_saved_samples_are_bounded_and_hold_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy_module, "MAX_SAVED_SAMPLES", 2)
    monkeypatch.setenv("MY_API_KEY", "a canary that sings")

    def mine(**kwargs):
        raise ValueError("a canary that sings")

    _, scores, logged = run(mine, tmp_path)
    assert scores == [None] * 4
    assert logged == {"rewards/mine/failed": 1.0}
    assert len(saved_samples(tmp_path)) == 2
    assert "canary" not in (tmp_path / "run/bad_rewards.jsonl").read_text()
    with pytest.raises(ConfigError) as caught:
        run(mine, tmp_path, "fail")
    assert "canary" not in str(caught.value)


def test_odd_values_are_saved_as_text(tmp_path: Path) -> None:
    reward = guard(
        "mine",
        reward_scoring_bad_with(divide),
        ErrorPolicy("none", None, tmp_path / "run/bad_rewards.jsonl"),
    )
    reward(["p"] * 4, COMPLETIONS, x=[{1}, float("nan"), "\ud800", 0], answer=[object()] * 4)
    (record,) = saved_samples(tmp_path)
    assert record["columns"]["x"] == "NaN"


def test_a_full_disk_does_not_hide_the_problem(tmp_path: Path) -> None:
    reward = guard(
        "mine", reward_scoring_bad_with(divide), ErrorPolicy("fail", None, Path("/dev/full/x"))
    )
    with pytest.raises(ConfigError, match=r"ZeroDivisionError[\s\S]*could not be saved"):
        reward(["p"] * 4, COMPLETIONS)
