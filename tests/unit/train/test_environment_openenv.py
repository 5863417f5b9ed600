"""OpenEnv as the environment of a run. The real package is installed in a separate virtual
environment.
"""

from __future__ import annotations

import json
import random
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from toolkit.base.errors import ConfigError
from toolkit.config.build_config import build_config
from toolkit.config.document_loader import assemble
from toolkit.config.environments import missing_package
from toolkit.config.source import Source
from toolkit.train.rewards import load_rewards
from toolkit.train.rewards.environment_code import environment_code_of
from toolkit.train.rewards.environment_problems import request_problems
from toolkit.train.rewards.worker_process import Workers
from toolkit.train.rollout.tools import CallFailed, EpisodeHost

sys.path.append(str(Path(__file__).parents[2] / "fixtures"))
from openenv_venv import interpreter

pytestmark = pytest.mark.slow
FOLDER = Path(__file__).parent / "environments"


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The interpreter of a virtual environment with OpenEnv. Its installation takes minutes."""
    return interpreter(tmp_path_factory.mktemp("openenv") / "venv")


def config_of(python: str, task: str = "guess_game:Game", **options: Any) -> Any:
    environment = {"adapter": "openenv", "task": task, "size": 3, "seed": 5, "python": python}
    run = {
        "model": {"model_name": "m"},
        "environment": {**environment, "options": options},
        "reward": {"on_error": "none", "timeout_s": 5},
        "runtime": {"allow_code": ["openenv", "guess_game"]},
    }
    path = FOLDER / "run.json"
    return build_config(assemble(Source("run.json", json.dumps(run), FOLDER, path, "json")))


class World:
    """The rows, the reward and the host of the episodes of a run file."""

    def __init__(self, config: Any, folder: Path) -> None:
        from toolkit.train.data.dataset import load_data

        workers, code = Workers.create(config.environment.python), environment_code_of(config)
        make = partial(request_problems, code, workers.environment, 60)
        data = load_data(config.dataset, None, environment=config.environment, make_problems=make)
        self.rows, self.worker = list(data.train), workers.environment
        self.host = EpisodeHost(code, workers.environment, config.reward.timeout_s)
        columns = data.train.column_names
        (self.reward,) = load_rewards(config, folder, columns=columns, workers=workers).functions

    def scores(self, episodes: list[Any]) -> Any:
        return self.reward(
            prompts=[""] * len(episodes), completions=[[]] * len(episodes), environments=episodes
        )


def secret(row: dict[str, Any]) -> int:
    return random.Random(json.loads(row["problem"])["seed"]).randint(1, 9)


def test_a_rollout_acts_in_the_environment(python: str, tmp_path: Path) -> None:
    world = World(config_of(python), tmp_path)
    assert [row["prompt"] for row in world.rows] == ["Guess a number from 1 to 9."] * 3
    assert world.host.schema["function"]["name"] == "step"
    assert world.host.schema["function"]["parameters"]["required"] == ["number"]
    episodes = [world.host() for _ in world.rows]
    for episode, row in zip(episodes, world.rows, strict=True):
        episode.reset(**row)
    first, second, _ = episodes
    low = secret(world.rows[0])
    assert first.step(number=low - 1) == "higher"
    assert second.step(number=99) == "lower"
    # The next call starts a new worker, which repeats the earlier steps in new environments.
    world.worker.close()
    assert first.step(number=low) == "right\n(the episode has ended)"
    with pytest.raises(CallFailed, match="the episode has ended"):
        first.step(number=low)
    with pytest.raises(CallFailed, match="wrong arguments: number"):
        second.step(number="many")
    assert world.scores(episodes) == [pytest.approx(0.9), pytest.approx(-0.1), 0.0]
    world.worker.close()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("raises", "raised RuntimeError: the board is broken"),
        ("hangs", "took longer than 5 s"),
        ("nonsense", "returned nan, which is not a finite 32-bit number"),
        ("changes", "returned another first observation for the seed 5 than before"),
    ],
)
def test_a_failing_environment_is_handled_according_to_reward_on_error(
    python: str, tmp_path: Path, fault: str, message: str
) -> None:
    """The rollout that fails has no score and is saved. Other rollouts keep their scores."""
    world = World(config_of(python, fault=fault), tmp_path)
    one, other = world.host(), world.host()
    one.reset(**world.rows[0])
    other.reset(**world.rows[1] if fault != "changes" else world.rows[0])
    if fault != "changes":
        if fault == "hangs":
            assert one.step(number=99) == "lower"
        with pytest.raises(CallFailed, match=message):
            one.step(number=99)
    expected: list[Any] = [None, None] if fault == "changes" else [None, 0.0]
    assert world.scores([one, other]) == expected
    (first, *_) = (tmp_path / "bad_rewards.jsonl").read_text().splitlines()
    assert message in json.loads(first)["problem"]
    world.worker.close()


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("guess_game:Nothing", "is not a subclass of OpenEnv's Environment"),
        ("guess_game:Untyped", "must have the type hint of an Action class"),
        ("other_game:Game", "allow_code"),
    ],
)
def test_an_unusable_environment_is_refused(
    python: str, tmp_path: Path, task: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        World(config_of(python, task), tmp_path)


def test_the_package_is_found_in_the_other_interpreter(python: str) -> None:
    assert missing_package("openenv", python) is None
    assert missing_package("verifiers", python) is not None
