"""reasoning-gym as the environment of a run: the seed determines the problems, the scorer of the
task scores them, and wrong settings are refused.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from toolkit.base.errors import ConfigError
from toolkit.config.build_config import build_config
from toolkit.config.document_loader import assemble
from toolkit.config.source import Source
from toolkit.train.checkpointing.run_directory import as_mapping, fingerprint
from toolkit.train.rewards import load_rewards
from toolkit.train.rewards.environment_code import environment_code_of
from toolkit.train.rewards.environment_problems import request_problems

pytest.importorskip("reasoning_gym")
TEXT = """
model: {model_name: m}
environment: {adapter: reasoning_gym, task: leg_counting, size: 6, seed: 4,
  options: {max_animals: 4}}
runtime: {allow_code: [reasoning_gym], output_dir: /runs/one}
"""


def config_of(text: str) -> Any:
    return build_config(assemble(Source("run.yaml", text, Path.cwd())))


def rows_of(config: Any) -> Any:
    from toolkit.train.data.dataset import load_data

    make = partial(request_problems, environment_code_of(config), None, None)
    return load_data(config.dataset, None, environment=config.environment, make_problems=make)


def test_the_same_seed_makes_the_same_problems() -> None:
    first, again = rows_of(config_of(TEXT)), rows_of(config_of(TEXT))
    assert len(first.train) == 6
    assert first.train[:] == again.train[:]
    assert first.report.train.digest == again.report.train.digest
    other = rows_of(config_of(TEXT.replace("seed: 4", "seed: 5")))
    assert other.report.train.digest != first.report.train.digest
    assert first.report.lines() == ["6 plain prompts from reasoning_gym:leg_counting"]


def test_held_out_problems_differ_from_training_problems() -> None:
    data = rows_of(config_of(TEXT.replace("size: 6", "size: 50, eval_size: 20")))
    assert len(data.eval) == 20
    assert not set(data.eval["prompt"]) & set(data.train["prompt"])


@pytest.mark.parametrize("isolate", [True, False])
def test_the_scorer_of_the_task_scores(isolate: bool, tmp_path: Path) -> None:
    """The scorer runs in the worker process or in this process."""
    config = config_of(TEXT + f"reward: {{isolate: {str(isolate).lower()}}}")
    data = rows_of(config).train
    assert [one.name for one in config.reward.functions] == ["reasoning_gym"]
    rewards = load_rewards(config, tmp_path, columns=data.column_names)
    (reward,) = rewards.functions
    columns = {name: list(data[name]) for name in data.column_names if name != "prompt"}
    right = [f"I think <answer>{answer}</answer>" for answer in data["answer"]]
    bare, wrong = list(data["answer"]), ["nothing"] * len(data)
    scores = [reward(prompts=list(data["prompt"]), completions=one, **columns)
              for one in (right, bare, wrong)]  # fmt: skip
    assert scores == [[1.0] * 6, [1.0] * 6, [0.0] * 6]


def test_the_config_of_a_run_is_a_run_file() -> None:
    """A config that is written and read again has the scorer once. The config of a run without an
    environment has no such section.
    """
    config = config_of(TEXT)
    text = json.dumps(as_mapping(config))
    again = build_config(assemble(Source("config.json", text, Path.cwd(), None, "json")))
    assert as_mapping(again) == as_mapping(config)
    assert fingerprint(config, {})["environment.task"] == "leg_counting"
    assert "environment" not in as_mapping(config_of("model: {model_name: m}"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("leg_counting", "leg_countin", "did you mean leg_counting?"),
        ("max_animals: 4", "max_animal: 4", "does not accept these settings"),
        ("max_animals: 4", "max_animals: 1", "does not accept these settings"),
    ],
)
def test_a_wrong_task_or_setting_is_refused(old: str, new: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        rows_of(config_of(TEXT.replace(old, new)))
    assert message in str(refused.value)


def test_code_that_is_not_allowed_does_not_run(tmp_path: Path) -> None:
    config = config_of(TEXT.replace("allow_code: [reasoning_gym]", "allow_code: [other]"))
    with pytest.raises(ConfigError, match="allow_code"):
        load_rewards(config, tmp_path, columns=["prompt", "answer", "problem"])
