"""The behaviour of TRL that the rewards depend on: how it calls rewards, names them, and detects
async functions.
"""

from __future__ import annotations

import asyncio
import inspect
import re

import pytest
from trl import GRPOTrainer
from trl.trainer import utils

from toolkit.config.reward_table import PASSED_BY_TRL
from toolkit.train.rewards.error_policy import ErrorPolicy, guard, is_async

pytestmark = pytest.mark.contract
SOURCE = inspect.getsource(GRPOTrainer._calculate_rewards)


async def async_reward(completions, **kwargs):
    return [1.0] * len(completions)


def sync_reward(completions, **kwargs):
    return [1.0] * len(completions)


def test_passed_by_trl_has_the_arguments_that_trl_passes() -> None:
    added = set(re.findall(r'(?<!row_)reward_kwargs\["(\w+)"\]', SOURCE))
    called = set(re.findall(r"(\w+)=(?:prompts|completions|completion_ids_list)\b", SOURCE))
    assert added | called == PASSED_BY_TRL


def test_a_guarded_reward_has_the_name_and_kind_of_its_function() -> None:
    for function in (async_reward, sync_reward):
        guarded = guard("mine", function, ErrorPolicy())
        assert utils.get_callable_name(guarded) == "mine"
        assert utils.is_async_callable(guarded) is utils.is_async_callable(function)
        assert is_async(function) is utils.is_async_callable(function)


def test_an_async_reward_is_awaited() -> None:
    guarded = guard("mine", async_reward, ErrorPolicy())
    assert asyncio.run(guarded(prompts=["p"], completions=["c"])) == [1.0]


def test_a_reward_of_none_is_ignored() -> None:
    assert "reward if reward is not None else torch.nan" in SOURCE
    scoring = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    assert "nansum" in scoring
    assert "torch.nanmean(rewards_per_func[:, i])" in scoring
