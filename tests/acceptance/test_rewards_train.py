"""Several rewards in a real run with ``on_error: none``. One of them fails in another way in each
step.
"""

from __future__ import annotations

import json

import pytest
from spoiled_world import FinishedCommand, make_model, make_world, run_commands

pytestmark = pytest.mark.thorough

MISBEHAVES = """\
import asyncio, re, time

def nothing(completions, trainer_state, **kwargs):
    step, wrong = trainer_state.global_step, completions[0]
    def one(text):
        if text != wrong:
            return 1.0
        if step == 0:
            raise KeyError(text)
        if step == 1:
            return float("nan")
        if step == 2:
            return "a text"
        if step == 3:
            time.sleep(60)
        if step == 4:
            re.fullmatch("(a+)+b", "a" * 60)
    found = [one(text) for text in completions]
    return found[1:] if step == 5 else found

async def later(completions, trainer_state, log_extra, **kwargs):
    await asyncio.sleep(0)
    if trainer_state.global_step in (0, 2):
        log_extra("seen", [trainer_state.global_step] * len(completions))
    return [0.5] * len(completions)

def texts(completions, log_metric, **kwargs):
    log_metric("chat", float(isinstance(completions[0], list)))
    return [float(len(set(c if isinstance(c, str) else c[0]["content"]))) for c in completions]
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FinishedCommand]:
    root = tmp_path_factory.mktemp("rewards")
    model = make_model(root)
    folder = make_world(
        root / "none",
        model,
        reward={
            "functions": [
                {"name": "mine:nothing", "weight": 2.0},
                {"name": "mine:later"},
                {"name": "numeric_match", "weight": 0.5},
                {"name": "length_penalty", "options": {"max_length": 4, "margin": 2}},
            ],
            "on_error": "none",
            "timeout_s": 2.0,
        },
        grpo={"max_steps": 6},
    )
    (folder / "mine.py").write_text(MISBEHAVES)
    chat = make_world(
        root / "chat",
        model,
        reward={"functions": [{"name": "mine:texts"}, {"name": "numeric_match"}]},
        dataset={"prompt": "messages"},
        model={"model_name": "chat-model"},
        grpo={"max_steps": 1},
    )
    from tiny_llama import make_tiny

    make_tiny(chat / "chat-model", chat=True)
    (chat / "mine.py").write_text(MISBEHAVES)
    row = {"messages": [{"role": "user", "content": "1+2="}], "answer": "3"}
    (chat / "train.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    cases = [{"folder": where, "arguments": ["train", "run.yaml"]} for where in (folder, chat)]
    return dict(zip(("none", "chat"), run_commands(cases), strict=True))


def test_a_failing_reward_is_scored_none_and_the_run_completes(
    results: dict[str, FinishedCommand],
) -> None:
    run = results["none"]
    assert run.returncode == 0, run.stderr
    rows = run.rows()
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(row["rewards/nothing/failed"] >= 0.25 for row in rows)
    assert all(row["rewards/later/mean"] == 0.5 for row in rows)
    problems = " ".join(record["problem"] for record in run.rows("bad_rewards.jsonl"))
    for what in ("raised KeyError", "returned nan", "returned a str", "longer than 2 s"):
        assert what in problems
    assert "returned 3 rewards for 4 completions" in problems


def test_the_reward_is_the_weighted_sum_of_the_scores(results: dict[str, FinishedCommand]) -> None:
    weights = {"nothing": 2.0, "later": 1.0, "numeric_match": 0.5, "length_penalty": 1.0}
    rows = results["none"].rows("completions.jsonl")
    assert len(rows) == 24
    assert any(row["rewards"]["nothing"] is None for row in rows)
    for row in rows:
        scored = {name: value for name, value in row["rewards"].items() if value is not None}
        assert row["reward"] == pytest.approx(sum(weights[n] * v for n, v in scored.items()))
        assert set(row["rewards"]) == set(weights)


def test_values_that_a_reward_logs_are_in_the_row_of_its_completion(
    results: dict[str, FinishedCommand],
) -> None:
    """Values of log_extra are only in the rows of the steps in which the reward called it."""
    rows = results["none"].rows("completions.jsonl")
    assert {row["step"]: row.get("extra") for row in rows} == {
        1: {"seen": 0}, 2: None, 3: {"seen": 2}, 4: None, 5: None, 6: None
    }  # fmt: skip


def test_the_report_shows_the_failed_rewards(results: dict[str, FinishedCommand]) -> None:
    report = (results["none"].folder / "out" / "report.html").read_text()
    assert "samples on which a reward failed" in report
    assert "length_penalty" in report


def test_rewards_get_chat_completions_as_messages(results: dict[str, FinishedCommand]) -> None:
    run = results["chat"]
    assert run.returncode == 0, run.stderr
    (row,) = run.rows()
    assert row["chat"] == 1.0
    assert row["rewards/texts/mean"] > 0
    completion_row = run.rows("completions.jsonl")[0]
    assert completion_row["prompt"] == [{"content": "1+2=", "role": "user"}]
