"""Tools of a run file are called in rollouts and have a time limit. Tools that cannot be called are
errors.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path  # noqa: TC003 - pytest evaluates the annotation
from typing import Any

import pytest
from spoiled_world import FIXTURES, FinishedCommand, make_world, run_commands

pytestmark = pytest.mark.slow
TOOLS = '''\
import time


def measure(text: str) -> int:
    """The number of characters of a text.

    Args:
        text: any text
    """
    return len(text)


def slow(text: str) -> int:
    """A call that takes too long.

    Args:
        text: any text
    """
    time.sleep(60)


def bare(text):
    return text
'''
SCORE = """\
import hashlib

def score(completions, **kwargs):
    return [float(len(set(str(messages[0])))) for messages in completions]

def hard(prompts, completions, **kwargs):
    # All rewards are equal for each of the sixteen prompts except two.
    asked = [messages[-1]["content"] for messages in prompts]
    digests = [hashlib.sha256(str(messages).encode()).digest() for messages in completions]
    return [one[0] / 256 if text in ("3+4=", "8+9=") else 0.0 for text, one in zip(asked, digests)]
"""
CHAT = (
    "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}({{ c['function']['name'] }}"
    "{% for k, v in c['function']['arguments'].items() %} {{ k }} {{ v }}{% endfor %})"
    "{% endfor %}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def template(function: str) -> dict[str, Any]:
    """A response template that parses any answer of the model as a call of ``function`` with the
    answer as its argument.
    """
    call = {"name": function, "arguments": {"text": "{said}"}}
    return {
        "defaults": {"role": "assistant"},
        "start_anchor": "<a>",
        "fields": {
            "tool_calls": {
                "open_pattern": "(?P<said>.+)",
                "repeats": True,
                "content": "text",
                "transform": {"type": "function", "function": call},
            },
            "content": {"content": "text"},
        },
    }


def world(
    folder: Path, function: str = "measure", grpo: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    """Make a folder whose model calls ``function`` in every completion, and return its training
    command for ``run_commands``.
    """
    sys.path.append(str(FIXTURES))
    from tiny_llama import make_tiny, make_tokenizer

    checkpoint = make_tiny(folder / "calls")
    tokenizer = make_tokenizer()
    tokenizer.chat_template, tokenizer.response_template = CHAT, template(function)
    tokenizer.save_pretrained(checkpoint)
    world_folder = make_world(
        folder / "world",
        checkpoint,
        grpo={
            "max_completion_length": 24,
            "max_tool_calling_iterations": 1,
            "max_steps": 1,
            **(grpo or {}),
        },
        runtime={"allow_code": ["mine", "my_tools"]},
    )
    (world_folder / "mine.py").write_text(SCORE)
    (world_folder / "my_tools.py").write_text(TOOLS)
    run = json.loads((world_folder / "run.yaml").read_text())
    run["tools"] = {"functions": [f"my_tools:{function}"], **more}
    (world_folder / "run.yaml").write_text(json.dumps(run))
    return {"folder": world_folder, "arguments": ["train", "run.yaml"], "limit_s": 240}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FinishedCommand]:
    """All runs of this module, in one process that has imported the libraries."""
    cases = {
        "measure": world(tmp_path_factory.mktemp("measure")),
        "slow": world(tmp_path_factory.mktemp("slow"), "slow", timeout_s=0.2),
        "bare": world(tmp_path_factory.mktemp("bare"), "bare"),
        "strict": world(tmp_path_factory.mktemp("strict"), "slow", timeout_s=0.2, on_error="fail"),
        "whole": world(tmp_path_factory.mktemp("whole"), grpo={"max_steps": 3, "save_steps": 1}),
    }
    cases["again"] = world(tmp_path_factory.mktemp("again"))
    run_file = cases["again"]["folder"] / "run.yaml"
    run = json.loads(run_file.read_text())
    run["grpo"] |= {"dynamic_sampling": True, "max_resample_times": 16}
    run["reward"] = {"functions": [{"name": "mine:hard"}]}
    run_file.write_text(json.dumps(run))
    plain = world(tmp_path_factory.mktemp("plain"))
    tokenizer = plain["folder"] / "model" / "tokenizer_config.json"
    values = json.loads(tokenizer.read_text())
    values.pop("chat_template", None)
    tokenizer.write_text(json.dumps(values))
    (plain["folder"] / "model" / "chat_template.jinja").unlink(missing_ok=True)
    cases["plain"] = plain
    return dict(zip(cases, run_commands(list(cases.values())), strict=True))


def test_tools_are_called(results: dict[str, FinishedCommand]) -> None:
    run = results["measure"]
    assert run.returncode == 0, run.stderr
    (row,) = [row for row in run.rows() if "tools/call_frequency" in row]
    assert row["tools/call_frequency"] == 1
    assert row["tools/failure_frequency"] == 0
    config = json.loads((run.folder / "out" / "config.json").read_text())
    assert config["tools"] == {
        "functions": ["my_tools:measure"],
        "timeout_s": 30.0,
        "on_error": "answer",
    }
    calls = run.rows("tool_calls.jsonl")
    assert [(row["step"], row["completion"], row["turn"]) for row in calls] == [
        (1, completion, 1) for completion in range(4)
    ]
    for row in calls:
        assert (row["tool"], row["failed"]) == ("measure", False)
        assert row["result"] == str(len(row["arguments"]["text"]))
    times = run.rows("tool_timings.jsonl")
    assert len(times) == 4
    assert all(row["time_s"] > 0 for row in times)


def test_a_resumed_run_logs_the_same_bytes(results: dict[str, FinishedCommand]) -> None:
    """The run resumes from the checkpoint of step 2, as after a kill in step 3."""
    run = results["whole"]
    assert run.returncode == 0, run.stderr
    out = run.folder / "out"
    logs = ("tool_calls.jsonl", "completions.jsonl", "metrics.jsonl")
    before = {name: (out / name).read_bytes() for name in logs}
    assert {row["step"] for row in run.rows("tool_calls.jsonl")} == {1, 2, 3}
    arguments = ["train", "run.yaml", "--set", "runtime.resume=out/checkpoint-2"]
    (again,) = run_commands([{"folder": run.folder, "arguments": arguments, "limit_s": 240}])
    assert again.returncode == 0, again.stderr
    assert {name: (out / name).read_bytes() for name in logs} == before
    assert len(again.rows("tool_timings.jsonl")) == 12


def test_a_failing_tool_can_end_the_run(results: dict[str, FinishedCommand]) -> None:
    run = results["strict"]
    assert run.returncode == 1
    assert "tool my_tools:slow took longer than 0.2 s" in run.stderr
    assert "tools.on_error: answer" in run.stderr


def test_groups_with_tools_are_sampled_again(results: dict[str, FinishedCommand]) -> None:
    run = results["again"]
    assert run.returncode == 0, run.stderr
    (row,) = [row for row in run.rows() if "dynamic_sampling/rounds" in row]
    assert row["dynamic_sampling/rounds"] > 0
    assert row["dynamic_sampling/no_spread_after"] == 0
    assert row["tools/call_frequency"] == 1
    log = (run.folder / "out" / "completions.jsonl").read_text().splitlines()
    completions = [json.loads(line) for line in log]
    assert len(completions) == 4
    for one in completions:
        assert one["prompt"][-1]["content"] in ("3+4=", "8+9=")
        assert one["completion"][0]["tool_calls"][0]["function"]["name"] == "measure"
        assert one["extra"]["resample_round"] == row["dynamic_sampling/rounds"]


def test_a_slow_tool_is_interrupted_and_counted(results: dict[str, FinishedCommand]) -> None:
    run = results["slow"]
    assert run.returncode == 0, run.stderr
    (row,) = [row for row in run.rows() if "tools/call_frequency" in row]
    assert row["tools/failure_frequency"] == 1


@pytest.mark.parametrize(
    ("case", "message"), [("bare", "bare has no docstring"), ("plain", "a chat")]
)
def test_tools_that_cannot_be_called_are_errors(
    results: dict[str, FinishedCommand], case: str, message: str
) -> None:
    assert results[case].returncode == 1
    assert message in results[case].stderr
