"""Datasets of plain prompts with a model that has a chat template: training, output, logs,
``toolkit generate`` and resume.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest
from spoiled_world import FIXTURES, FinishedCommand, make_world, run_commands

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.thorough

SCORE = """\
def score(completions, **kwargs):
    return [float(len(set(one[0]["content"]))) for one in completions]

def nothing(completions, **kwargs):
    return [None for _ in completions]
"""


@pytest.fixture(scope="module")
def instruct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sys.path.append(str(FIXTURES))
    from tiny_llama import make_tiny

    return make_tiny(tmp_path_factory.mktemp("m") / "instruct", chat=True)


def world(folder: Path, checkpoint: Path, **changes: dict[str, Any]) -> Path:
    make_world(folder, checkpoint, **changes)
    (folder / "mine.py").write_text(SCORE)
    rows = [{"question": f"{i}+1=", "answer": str(i + 1)} for i in range(3)]
    (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def trained(instruct: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedCommand:
    folder = world(
        tmp_path_factory.mktemp("chats"), instruct,
        dataset={"eval_path": "eval.jsonl", "system": "say it"},
        grpo={"max_prompt_length": 48, "save_steps": 1},
    )  # fmt: skip
    return run_commands([{"folder": folder, "arguments": ["train", "run.yaml"]}])[0]


def test_texts_become_user_messages_and_the_run_prints_it(trained: FinishedCommand) -> None:
    assert trained.returncode == 0, trained.stderr
    assert "16 chats from " in trained.stdout
    assert "each text becomes a user message of the chat template (dataset.chat)" in trained.stdout
    config = json.loads((trained.folder / "out" / "config.json").read_text())
    assert config["dataset"]["chat"] is True
    prompts = [row["prompt"] for row in trained.rows("completions.jsonl")]
    assert prompts[0][0] == {"role": "system", "content": "say it"}
    assert {prompt[1]["role"] for prompt in prompts} == {"user"}


def test_held_out_data_is_used_without_an_eval_strategy(trained: FinishedCommand) -> None:
    """evaluation.json exists, and the first lines of the output announce the evaluation."""
    assert "held out evaluated before the first step and after the last" in trained.stdout
    evaluation = json.loads((trained.folder / "out" / "evaluation.json").read_text())
    assert {name: part["count"] for name, part in evaluation.items()} == {"before": 3, "after": 3}


def test_generate_uses_the_chat_format_of_the_run(trained: FinishedCommand) -> None:
    asked = ["generate", "out", "1+2=", "--max-tokens", "6"]
    cases = [{"folder": trained.folder, "arguments": [*asked, *more]} for more in ([], ["--chat"])]
    answers = [run_commands([case])[0] for case in cases]
    assert [one.returncode for one in answers] == [0, 0], answers[0].stderr
    assert answers[0].stdout == answers[1].stdout


def test_a_resumed_run_keeps_its_format(trained: FinishedCommand) -> None:
    more = ["--set", "grpo.max_steps=3", "--set", "runtime.allow_changed=[grpo.max_steps]"]
    changed = run_commands([{
        "folder": trained.folder,
        "arguments": ["train", "run.yaml", *more, "--set", "dataset.chat=false"],
    }])[0]  # fmt: skip
    assert changed.returncode == 1
    assert "dataset.chat (True -> False)" in changed.stderr
    resumed = run_commands([{"folder": trained.folder, "arguments": ["train", "run.yaml", *more]}])[
        0
    ]
    assert resumed.returncode == 0, resumed.stderr
    assert len(resumed.rows()) == 3


def test_rewards_that_are_all_none_give_one_warning(instruct: Path, tmp_path: Path) -> None:
    folder = world(tmp_path / "w", instruct, reward={"functions": [{"name": "mine:nothing"}]})
    result = run_commands([{"folder": folder, "arguments": ["train", "run.yaml"]}])[0]
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("warning: step 1: every reward is None or NaN") == 1
    assert [row["steps_without_signal"] for row in result.rows()] == [1, 2]


def test_a_run_without_a_dataset_is_an_error(instruct: Path, tmp_path: Path) -> None:
    folder = world(tmp_path / "w", instruct, dataset={"path": None})
    (result,) = run_commands([{"folder": folder, "arguments": ["train", "run.yaml"]}])
    assert result.returncode == 1
    assert "the run file names no dataset, so there are no prompts to train on" in result.stderr
