"""A whole run in an OpenEnv environment: several turns, the score as the reward, and a resume."""

from __future__ import annotations

import json
import sys
from collections import defaultdict

import pytest
from spoiled_world import FIXTURES, FinishedCommand, make_world, run_commands
from test_tools_train import CHAT, template

sys.path.append(str(FIXTURES))
from openenv_venv import interpreter
from tiny_llama import make_tiny, make_tokenizer

pytestmark = pytest.mark.slow
GAME = '''\
"""Say a text: its different characters count. The episode ends after two steps."""

from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State


class Say(Action):
    """Say a text."""

    text: str


class Heard(Observation):
    text: str = ""


class Letters(Environment[Say, Heard, State]):
    def __init__(self, each: float = 0.1) -> None:
        super().__init__()
        self.each, self.steps = each, 0

    def reset(self, seed=None, episode_id=None, **more) -> Heard:
        self.steps = 0
        return Heard(text=f"say {seed}")

    def step(self, action: Say, timeout_s=None, **more) -> Heard:
        self.steps += 1
        return Heard(text="ok", reward=self.each * len(set(action.text)), done=self.steps == 2)

    @property
    def state(self) -> State:
        return State(step_count=self.steps)
'''


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> FinishedCommand:
    """A finished run of two steps. Each answer of the model is the argument of a tool call."""
    checkpoint = make_tiny(tmp_path_factory.mktemp("model"))
    tokenizer = make_tokenizer()
    tokenizer.chat_template, tokenizer.response_template = CHAT, template("step")
    tokenizer.save_pretrained(checkpoint)
    folder = make_world(
        tmp_path_factory.mktemp("world"),
        checkpoint,
        model={"max_seq_length": 128},
        grpo={"max_completion_length": 64, "max_tool_calling_iterations": 2, "save_steps": 1},
        runtime={"allow_code": ["openenv", "letters"]},
    )
    run = json.loads((folder / "run.yaml").read_text())
    del run["dataset"], run["reward"]
    run["environment"] = {
        "adapter": "openenv",
        "task": "letters:Letters",
        "size": 8,
        "seed": 3,
        "options": {"each": 0.125},
        "python": interpreter(tmp_path_factory.mktemp("openenv") / "venv"),
    }
    (folder / "run.yaml").write_text(json.dumps(run))
    (folder / "letters.py").write_text(GAME)
    (folder / "train.jsonl").unlink()
    (result,) = run_commands(
        [{"folder": folder, "arguments": ["train", "run.yaml"], "limit_s": 240}]
    )
    return result


def test_a_run_in_an_environment_of_openenv(finished: FinishedCommand) -> None:
    assert finished.returncode == 0, finished.stderr
    assert "from openenv:letters:Letters" in finished.stdout
    rows = [row for row in finished.rows() if "rewards/openenv/mean" in row]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["tools/failure_frequency"] == 0 for row in rows)
    assert any(row["grad_norm"] > 0 for row in rows), "the rewards did not change the weights"
    assert (finished.folder / "out" / "adapter" / "adapter_model.safetensors").is_file()


def test_the_score_of_a_rollout_is_the_sum_of_its_steps(finished: FinishedCommand) -> None:
    expected: dict[tuple[int, int], float] = defaultdict(float)
    for call in finished.rows("tool_calls.jsonl"):
        assert call["tool"] == "step"
        expected[call["step"], call["completion"]] += len(set(call["arguments"]["text"])) / 8
        assert call["result"].startswith("ok")
    assert {call["turn"] for call in finished.rows("tool_calls.jsonl")} == {1, 2}
    completions = finished.rows("completions.jsonl")
    assert len(completions) == 8
    place: dict[int, int] = defaultdict(int)
    for one in completions:
        assert one["prompt"][-1]["content"] in {f"say {seed}" for seed in range(3, 11)}
        key = one["step"], place[one["step"]]
        place[one["step"]] += 1
        assert one["rewards"]["openenv"] == pytest.approx(expected[key])


def test_a_resumed_run_repeats_the_steps_of_the_first(finished: FinishedCommand) -> None:
    out = finished.folder / "out"
    logs = ("tool_calls.jsonl", "completions.jsonl", "metrics.jsonl")
    before = {name: (out / name).read_bytes() for name in logs}
    arguments = ["train", "run.yaml", "--set", "runtime.resume=out/checkpoint-1"]
    (again,) = run_commands([{"folder": finished.folder, "arguments": arguments, "limit_s": 240}])
    assert again.returncode == 0, again.stderr
    assert {name: (out / name).read_bytes() for name in logs} == before
