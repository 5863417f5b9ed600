"""Score a batch of four samples, one of which is "bad", with a reward function under an error
policy.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from toolkit.train.rewards.error_policy import AsyncGuardedReward, ErrorPolicy, guard

if TYPE_CHECKING:
    from pathlib import Path

COMPLETIONS = ["a", "bad", "c", "d"]


def run(function: Any, tmp_path: Path, on_error: str = "none", timeout_s: float | None = None):
    policy = ErrorPolicy(on_error, timeout_s, tmp_path / "run" / "bad_rewards.jsonl")  # type: ignore[arg-type]
    reward = guard("mine", function, policy)
    logged: dict[str, float] = {}
    columns = {"answer": [1, 2, 3, 4], "log_metric": logged.__setitem__, "log_extra": lambda *_: 1}
    call = reward(prompts=["p"] * 4, completions=list(COMPLETIONS), **columns)
    scores = asyncio.run(call) if isinstance(reward, AsyncGuardedReward) else call
    return reward, scores, logged


def saved_samples(tmp_path: Path) -> list[dict[str, Any]]:
    file = tmp_path / "run" / "bad_rewards.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def reward_scoring_bad_with(score: Any):
    """Return a reward function that calls ``score`` for the completion "bad", and scores all other
    completions with 1.0.
    """

    def mine(completions, **kwargs):
        return [score() if text == "bad" else 1.0 for text in completions]

    return mine
