"""Dynamic sampling replaces groups without spread of the rewards by groups of other prompts. The
metrics count the sampled and the discarded completions.
"""

from __future__ import annotations

import hashlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from trainer_helpers import ROWS, adapter_digest, arguments, history, make_trainer

from toolkit.base.errors import ConfigValueError, ToolkitWarning
from toolkit.train.rollout.difficulty import Difficulty
from toolkit.train.rollout.group_spread import spread_of
from toolkit.train.trainer import GRPOConfig, GRPOTrainer

NAME = "dynamic_sampling"


class PromptDependentReward:
    """A reward that is 0 for prompts that begin with 10 or 11. For other prompts, it depends on the
    completion.
    """

    def __init__(self) -> None:
        self.scored: list[list[str]] = []
        self.__name__ = "hard"

    def __call__(self, prompts: list[str], completions: list[str], **more: Any) -> list[float]:
        self.scored.append(list(prompts))
        more["log_extra"]("length", [len(one) for one in completions])
        pairs = zip(prompts, completions, strict=True)
        return [0.0 if has_equal_rewards(prompt) else text_value(text) for prompt, text in pairs]


def has_equal_rewards(prompt: str) -> bool:
    return prompt[:2] in ("10", "11")


def text_value(text: str) -> float:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 997 / 997


def equal_reward(completions: list[str], **_: Any) -> list[float]:
    return [0.5] * len(completions)


def train(folder: Any, rewards: Any, **grpo: Any) -> GRPOTrainer:
    trainer = make_trainer(folder, rewards=rewards, config=GRPOConfig, **grpo)
    trainer.train()
    return trainer


def logged_completions(trainer: GRPOTrainer) -> list[tuple[str, str]]:
    log = trainer.completion_log
    return list(zip(log["prompt"], log["completion"], strict=True))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Three trainers: ``whole`` ran with dynamic sampling, ``first`` ran only its first step, and
    ``plain`` ran the first step without dynamic sampling.
    """
    folder = tmp_path_factory.mktemp("runs")
    made = SimpleNamespace(reward=PromptDependentReward())
    made.whole = train(
        folder / "w", made.reward, dynamic_sampling=True, max_resample_times=9, max_steps=5
    )
    made.plain = train(folder / "p", PromptDependentReward(), max_steps=1)
    made.first = train(
        folder / "f",
        PromptDependentReward(),
        dynamic_sampling=True,
        max_resample_times=9,
        max_steps=1,
    )
    return made


def test_replaced_groups_have_spread_and_each_completion_is_scored_once(
    runs: SimpleNamespace,
) -> None:
    rows = history(runs.whole)
    assert len(rows) == 5
    assert {row[f"{NAME}/no_spread_after"] for row in rows} == {0}
    assert {row["frac_reward_zero_std"] for row in rows} == {0}
    assert max(row[f"{NAME}/no_spread_before"] for row in rows) > 0
    for row in rows:
        assert row[f"{NAME}/sampled_completions"] == 8 + row[f"{NAME}/discarded_completions"]
        again = row[f"{NAME}/no_spread_before"] > 0
        assert (row[f"{NAME}/rounds"] > 0) == again == (row[f"{NAME}/discarded_tokens"] > 0)
    scored = sum(map(len, runs.reward.scored))
    assert scored == sum(row[f"{NAME}/sampled_completions"] for row in rows)


def test_groups_with_spread_stay_and_the_others_have_new_prompts(runs: SimpleNamespace) -> None:
    before, after = logged_completions(runs.plain), logged_completions(runs.first)
    rounds = list(runs.first.completion_log["extra"]["resample_round"])
    for start in range(0, 8, 4):
        group = slice(start, start + 4)
        if has_equal_rewards(before[start][0]):
            assert not has_equal_rewards(after[start][0])
            assert min(rounds[group]) == max(rounds[group]) > 0
        else:
            assert after[group] == before[group]
            assert rounds[group] == [0] * 4
    assert sum(map(bool, rounds)) > 0
    assert len({prompt for prompt, _ in after}) == 2  # no prompt twice in a batch


def test_metrics_and_columns_describe_the_trained_completions(runs: SimpleNamespace) -> None:
    for trainer in (runs.first, runs.whole):
        (row, log) = history(trainer)[-1], trainer.completion_log
        (batch,) = trainer.rollout_buffer
        lengths = batch["completion_mask"].sum(dim=1).double()
        assert row["completions/mean_length"] == pytest.approx(lengths.mean().item())
        assert row["completions/max_length"] == lengths.max().item()
        assert list(log["extra"]["length"]) == [len(text) for text in log["completion"]]
        assert row["reward"] == pytest.approx(sum(map(text_value, log["completion"])) / 8)
    # num_tokens counts prompts (6 tokens each) and completions, also the discarded ones.
    first = history(runs.first)[0]
    tokens = 8 * first["completions/mean_length"] + first[f"{NAME}/discarded_tokens"]
    assert first["num_tokens"] == 6 * first[f"{NAME}/sampled_completions"] + tokens


@pytest.mark.parametrize(
    ("limit", "steps", "rounds", "message"),
    [(2, 2, 2, "max_resample_times is 2"), (50, 1, 11, "all 24 rows of the dataset were drawn")],
)
def test_groups_left_after_the_last_round_are_kept_with_a_warning(
    tmp_path: Any, limit: int, steps: int, rounds: int, message: str
) -> None:
    grpo = {"dynamic_sampling": True, "max_resample_times": limit, "max_steps": steps}
    with pytest.warns(ToolkitWarning, match=message) as caught:
        trainer = train(tmp_path / "a", equal_reward, **grpo)
    assert sum("all rewards are still equal after" in str(one.message) for one in caught) == 1
    first = history(trainer)[0]
    assert first[f"{NAME}/rounds"] == rounds
    assert first[f"{NAME}/no_spread_before"] == first[f"{NAME}/no_spread_after"] == 1
    assert first[f"{NAME}/discarded_completions"] == 8 * rounds
    plain = train(tmp_path / "b", equal_reward, max_steps=steps)
    assert logged_completions(trainer) == logged_completions(plain)
    assert adapter_digest(trainer) == adapter_digest(plain)


@pytest.mark.parametrize(
    "grpo",
    [
        pytest.param({"curriculum": True}, marks=pytest.mark.slow),
        {
            "dynamic_sampling": True,
            "max_resample_times": 9,
            "curriculum": True,
            "steps_per_generation": 4,
            "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": 4,
        },
    ],
    ids=["curriculum", "both, a generation feeds two steps"],
)
def test_a_resumed_run_chooses_the_same_prompts(tmp_path: Any, grpo: Any) -> None:
    whole = train(
        tmp_path / "a", PromptDependentReward(), save_strategy="steps", save_steps=3, **grpo
    )
    again = make_trainer(tmp_path / "b", rewards=PromptDependentReward(), config=GRPOConfig, **grpo)
    again.train(str(tmp_path / "a" / "checkpoint-3"))
    assert adapter_digest(again) == adapter_digest(whole)
    assert history(again) == history(whole)
    assert logged_completions(again) == logged_completions(whole)


def test_the_curriculum_draws_prompts_with_spread_again(tmp_path: Any) -> None:
    reward = PromptDependentReward()
    trainer = train(tmp_path, reward, curriculum=True, max_steps=12)
    rows = history(trainer)
    assert rows[0]["curriculum/repeated_share"] == 0
    assert {row["curriculum/repeated_share"] for row in rows[1:]} == {0.5}
    assert [row["curriculum/measured_share"] for row in rows[:3]] == [2 / 24, 3 / 24, 4 / 24]
    expected, of_all = (
        sum(row[f"curriculum/{name}"] for row in rows[1:])
        for name in ("expected_spread", "mean_spread")
    )
    assert expected > 1.2 * of_all
    # A batch has two prompts. The repeated prompt is the last one.
    fresh = [batch[0] for batch in reward.scored]
    again = [batch[4] for batch in reward.scored[1:]]
    assert len(set(fresh)) == 12
    assert sum(map(has_equal_rewards, fresh)) >= 3
    assert sum(map(has_equal_rewards, again)) <= 2


def test_prompts_with_the_largest_spread_are_drawn_most_often() -> None:
    """The rows 0 to 3 have the pass rates 0, 1/4, 1/2 and 1. The rows 4 and 5 are not measured."""
    difficulty = Difficulty(6)
    difficulty.record([0, 1, 2, 3], [0.0, 3**0.5 / 4, 0.5, 0.0])
    orders = [list(difficulty.draw_order(seed, [5, 4], 1.0)) for seed in range(400)]
    assert all(sorted(order) == [0, 1, 2, 3, 4, 5] for order in orders)
    assert all(order[4:] == [5, 4] for order in orders)  # not measured: given order
    firsts = [order[0] for order in orders]
    middle, flat = (firsts.count(1) + firsts.count(2)) / 400, firsts.count(0) + firsts.count(3)
    assert middle > 0.9
    assert flat > 0
    assert [list(difficulty.draw_order(seed, [5, 4], 1.0)) for seed in range(3)] == orders[:3]
    half = list(difficulty.draw_order(1, [5, 4], 0.5))
    assert [row in (4, 5) for row in half] == [True, False, True, False, False, False]
    difficulty.record([2], [0.0])
    assert difficulty.mean_spread([2]) == 0.25  # the latest draw has weight 1/2
    with pytest.raises(ValueError, match="curriculum records in the checkpoint"):
        Difficulty(5).load(difficulty.spread_N)
    with pytest.raises(ValueError, match="negative or infinite"):
        Difficulty(1).load(torch.tensor([-1.0], dtype=torch.float64))


NAN = float("nan")
SPREADS = [
    ([[0.1, 0.2], [0.1, 0.2]], [1, 1], False, 0.0),
    ([[1.0, 0.0], [0.0, 1.0]], [1, 1], False, 0.0),  # the sums are equal
    ([[1.0, 0.0], [0.0, 1.0]], [1, 2], True, 0.5),
    ([[1.0, 0.0], [0.0, 0.0]], [0, 1], False, 0.0),
    ([[NAN, NAN], [1.0, 0.0]], [1, 1], False, 0.0),  # only one completion has a reward
    ([[NAN, NAN], [NAN, NAN]], [1, 1], False, 0.0),
    ([[NAN, 1.0], [1.0, 1.0]], [1, 1], True, 0.5),
    ([[1e6 + 0.1, 0.0], [1e6 + 0.2, 0.0]], [1, 1], False, 0.0),  # differ by float32 rounding
]


@pytest.mark.parametrize(("rewards", "weights", "signal", "deviation"), SPREADS)
def test_the_spread_of_a_group(rewards: Any, weights: Any, signal: bool, deviation: float) -> None:
    other = [[3.0, 0.0], [1.0, 0.0]]
    values = torch.tensor([*rewards, *other], dtype=torch.float32)
    given = (values, torch.tensor(weights, dtype=torch.float32), 2)
    found = spread_of(*given, "sum_then_normalize")
    assert found.has_signal == [signal, weights[0] > 0]
    assert found.deviation[0] == pytest.approx(deviation, abs=0.1 if not signal else 1e-9)
    if weights == [1, 1] and rewards[0] == [1.0, 0.0]:  # each function has spread
        assert spread_of(*given, "normalize_then_sum").has_signal[0]


def test_arguments_that_exclude_dynamic_sampling_or_a_curriculum_are_refused(tmp_path: Any) -> None:
    def refused(match: str, rows: Any = None, fields: Any = None, **more: Any) -> None:
        with pytest.raises(ConfigValueError, match=match):
            GRPOTrainer(
                model="nowhere",
                reward_funcs=equal_reward,
                args=arguments(tmp_path, GRPOConfig, **(fields or {"dynamic_sampling": True})),
                train_dataset=Dataset.from_list(ROWS) if rows is None else rows,
                **more,
            )

    refused("does not work with rollout_func", rollout_func=print)
    refused("does not work with environment_factory", environment_factory=print)
    refused("does not work with images", Dataset.from_list([{"prompt": "a", "image": "b"}]))
    stream = Dataset.from_list(ROWS).to_iterable_dataset()
    refused("train_dataset is a stream", stream)
    refused(
        "curriculum=True reads rows of the dataset by their index", stream, {"curriculum": True}
    )
    for fields, match in (
        ({"dynamic_sampling": 3}, "dynamic_sampling=3 must be True or False"),
        ({"max_resample_times": 0}, "max_resample_times=0 must be a number of rounds above 0"),
        ({"curriculum_share": 1.5}, "curriculum_share=1.5 must be above 0 and at most 1"),
    ):
        with pytest.raises(ConfigValueError, match=match):
            arguments(tmp_path, GRPOConfig, **fields)
