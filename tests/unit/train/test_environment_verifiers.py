"""verifiers as the environment of a run: the tasks of a taskset, the rewards of the tasks, and
the tasksets that are refused.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from toolkit.base.errors import ConfigError
from toolkit.config.build_config import build_config
from toolkit.config.document_loader import assemble
from toolkit.config.source import Source
from toolkit.train.rewards import load_rewards
from toolkit.train.rewards.environment_code import environment_code_of
from toolkit.train.rewards.environment_problems import request_problems
from toolkit.train.rewards.worker_process import Workers

pytest.importorskip("verifiers.v1")
FOLDER = Path(__file__).parent / "environments"
TEXT = """
model: {model_name: m}
environment: {adapter: verifiers, task: sums-taskset, size: 4, eval_size: 2, options: {most: 9}}
runtime: {allow_code: [verifiers, sums_taskset, odd_tasksets], output_dir: /runs/one}
"""


def config_of(text: str = TEXT) -> Any:
    return build_config(assemble(Source("run.yaml", text, FOLDER, FOLDER / "run.yaml")))


def data_of(config: Any, worker: Any = None) -> Any:
    from toolkit.train.data.dataset import load_data

    make = partial(request_problems, environment_code_of(config), worker, 60)
    return load_data(config.dataset, None, environment=config.environment, make_problems=make)


@pytest.fixture(scope="module")
def workers() -> Any:
    """One worker process for all tests, which imports the package once."""
    both = Workers.create(None)
    yield both
    both.rewards.close()


def test_tasks_are_rows_and_their_rewards_score(workers: Any, tmp_path: Path) -> None:
    """The worker process loads and scores the tasks. This process does not import the taskset."""
    config = config_of()
    data = data_of(config, workers.environment)
    assert data.train["prompt"] == ["0+1=", "1+1=", "2+1=", "3+1="]
    assert data.train["answer"] == ["1", "2", "3", "4"]
    assert data.eval["prompt"] == ["4+1=", "5+1="]  # they follow the training tasks
    columns = data.train.column_names
    (reward,) = load_rewards(config, tmp_path, columns=columns, workers=workers).functions
    given = {name: list(data.train[name]) for name in columns if name != "prompt"}
    prompts = list(data.train["prompt"])
    replies = ["1", "two", " 3 ", [{"role": "assistant", "content": "4"}]]
    # The reward ``exact`` has weight 2. The reward ``digit`` has weight 0.5.
    assert reward(prompts=prompts, completions=replies, **given) == [2.5, 0.0, 2.5, 2.5]
    assert "sums_taskset" not in sys.modules


def test_a_seed_shuffles_a_finite_task_list(workers: Any) -> None:
    shuffled = config_of(TEXT.replace("size: 4,", "size: 4, seed: 3,"))
    first, again = (data_of(shuffled, workers.environment).train for _ in range(2))
    assert first[:] == again[:]
    assert first["prompt"] != ["0+1=", "1+1=", "2+1=", "3+1="]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("sums-taskset", "sums_tasks", "allow_code"),
        ("{most: 9}", "{mots: 9}", "does not accept these options"),
        ("{most: 9}", "{most: 3, kind: raises}", "raised RuntimeError: no tasks today"),
        ("{most: 9}", "{kind: container}", "its tasks run in a container"),
        ("{most: 9}", "{kind: no_prompt}", "a simulated user opens the conversation"),
        ("{most: 9}", "{kind: sandbox}", "its reward sandboxed reads a sandbox"),
        ("{most: 9}", "{kind: no_reward}", "its tasks have no @reward method"),
        ("{most: 9}", "{kind: tools}", "its tasks have tool servers"),
        ("eval_size: 2", "eval_size: 2, size: 20", "no more tasks after the first 20"),
    ],
)
def test_an_unsupported_taskset_is_refused(workers: Any, old: str, new: str, message: str) -> None:
    text = TEXT.replace("size: 4, ", "") if "size: 20" in new else TEXT
    with pytest.raises(ConfigError) as refused:
        data_of(config_of(text.replace(old, new)), workers.environment)
    assert message in str(refused.value)


@pytest.mark.slow
def test_making_problems_has_a_time_limit() -> None:
    config = config_of(TEXT.replace("{most: 9}", "{kind: hangs}"))
    workers = Workers.create(None)
    with pytest.raises(ConfigError, match="took longer than 20 s while it generated its problems"):
        request_problems(
            environment_code_of(config), workers.environment, 20, seed=0, size=2, start=0
        )


def test_a_taskset_that_changes_is_an_error_of_the_sample(workers: Any, tmp_path: Path) -> None:
    config = config_of(TEXT + "reward: {on_error: none}")
    data = data_of(config, workers.environment).train
    columns = data.column_names
    (reward,) = load_rewards(config, tmp_path, columns=columns, workers=workers).functions
    which = [json.dumps({"index": index, "key": "of another task"}) for index in range(4)]
    given = {"answer": list(data["answer"]), "problem": which}
    assert reward(prompts=list(data["prompt"]), completions=["1"] * 4, **given) == [None] * 4
    (first, *_) = (tmp_path / "bad_rewards.jsonl").read_text().splitlines()
    assert "load() returns a different task at index 0 than when the run began" in first
