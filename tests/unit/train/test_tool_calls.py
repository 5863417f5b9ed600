"""Tools of a run file in the worker process: their answers, their failures, and their logs."""

from __future__ import annotations

import json
import sys
from pathlib import Path  # noqa: TC003 - pytest reads it
from typing import Any

import pytest

from toolkit.base.errors import ConfigError
from toolkit.config.build_config import build_config
from toolkit.config.document_loader import assemble
from toolkit.config.source import Source
from toolkit.train.report.metrics_log import LOG_FILES, TOOL_LOG_FILES, Journal
from toolkit.train.rewards.worker_process import WorkerProcess
from toolkit.train.rollout.tool_log import MAX_RESULT_CHARACTERS, ToolLog
from toolkit.train.rollout.tools import CallFailed, StopRun, load_tools

TOOLS = '''\
import os
import random
import time


def measure(text: str, times: int = 1) -> int:
    """The number of characters of a text.

    Args:
        text: any text
        times: a factor
    """
    return len(text) * times


async def later(text: str) -> str:
    """The text itself, a moment later.

    Args:
        text: any text
    """
    return text


def draw() -> float:
    """A random number."""
    return random.random()


def bad(how: str) -> object:
    """Fails.

    Args:
        how: in which way
    """
    if how == "raises":
        raise RuntimeError("no such page")
    if how == "hangs":
        while True:
            try:
                time.sleep(600)
            except BaseException:
                pass
    if how == "long":
        return "x" * 3_000_000
    if how == "exits":
        os._exit(3)
    if how == "half":
        return "half of \\ud800"
    return NoText()


class NoText:
    def __str__(self):
        raise ValueError("no text")


def bare(text):
    return text
'''
NAMES = ["measure", "later", "draw", "bad"]


def load(folder: Path, worker: Any, names: list[str] = NAMES, **more: Any) -> dict[str, Any]:
    (folder / "my_own_tools.py").write_text(TOOLS)
    section = {"functions": [f"my_own_tools:{name}" for name in names], **more}
    run = {
        "model": {"model_name": "m"},
        "tools": section,
        "reward": {"functions": [{"name": "exact_match"}]},
        "runtime": {"allow_code": ["my_own_tools"]},
    }
    path = folder / "run.json"
    config = build_config(assemble(Source("run.json", json.dumps(run), folder, path, "json")))
    return {tool.__name__: tool for tool in load_tools(config, worker)}


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tools, in one worker process."""
    worker = WorkerProcess()
    yield load(tmp_path_factory.mktemp("tools"), worker, timeout_s=1)
    worker.close()


def test_tools_run_in_the_worker_process(tools: dict[str, Any]) -> None:
    assert tools["measure"](text="four", times=2) == "8"
    assert tools["later"](text="four") == "four"
    # A chat template reads the schema. This process does not import the module of the tools.
    assert tools["measure"]["function"]["parameters"]["required"] == ["text"]
    assert "my_own_tools" not in sys.modules


def test_random_numbers_depend_on_the_position_of_a_call(tools: dict[str, Any]) -> None:
    """So a resumed run or a restarted worker draws the same numbers."""
    ask = tools["draw"].answer
    first = [ask({}, (3, completion, 1, 1)) for completion in (0, 1)]
    with pytest.raises(CallFailed):
        tools["bad"](how="exits")
    assert [ask({}, (3, completion, 1, 1)) for completion in (0, 1)] == first
    assert first[0] != first[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"how": "raises"}, "raised RuntimeError: no such page"),
        ({"how": "hangs"}, "took longer than 1 s"),
        ({"how": "long"}, "returned 3000000 characters, more than 100000"),
        ({"how": "exits"}, "ended its process with exit code 3"),
        ({"how": "none"}, "returned a value that cannot become text: ValueError: no text"),
        ({"who": "me"}, "wrong arguments: missing a required argument: 'how'"),
    ],
)
def test_a_failure_is_an_answer_to_the_model(
    tools: dict[str, Any], arguments: Any, message: str
) -> None:
    with pytest.raises(CallFailed) as failed:
        tools["bad"](**arguments)
    assert message in str(failed.value)
    assert tools["measure"](text="four") == "4"  # later calls work


def test_a_lone_surrogate_is_escaped(tools: dict[str, Any]) -> None:
    assert tools["bad"](how="half") == "half of \\ud800"


def test_a_failure_can_end_the_run(tmp_path: Path) -> None:
    """The tool runs in this process (reward.isolate: false). Wrong arguments do not end the run."""
    bad = load(tmp_path, None, ["bad", "later"], on_error="fail")["bad"]
    with pytest.raises(CallFailed, match="wrong arguments"):
        bad(who="me")
    with pytest.raises(StopRun) as stopped:
        bad(how="raises")
    message = str(stopped.value.error)
    assert "tool my_own_tools:bad raised RuntimeError: no such page" in message
    assert 'arguments of the call: {"how": "raises"}' in message
    assert "tools.on_error: answer" in message
    sys.modules.pop("my_own_tools")


def test_a_tool_without_a_description_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tool my_own_tools:bare"):
        load(tmp_path, None, ["bare"])
    sys.modules.pop("my_own_tools")


class Rollouts:
    """The attribute of a trainer that ToolLog reads."""

    def __init__(self, tools: dict[str, Any], rows: int) -> None:
        self.tools_by_row = [dict(tools) for _ in range(rows)]


def test_each_call_is_logged_with_its_turn(tools: dict[str, Any], tmp_path: Path) -> None:
    """As in TRL's loop, the name that the model wrote is looked up in the tools of the row."""
    trainer, log = Rollouts(tools, 2), ToolLog()
    messages: list[list[Any]] = [[{"role": "assistant"}], [{"role": "assistant"}]]
    calls = log.record_calls(trainer, messages, [4, 5], 0)
    one, other = trainer.tools_by_row
    assert "nothing" in other
    with pytest.raises(CallFailed, match="Tool nothing not found"):
        other["nothing"](text="a")
    assert one["measure"](text="four") == "4"
    with pytest.raises(TypeError):
        one["measure"](**"four")
    messages[0] += [{"role": "tool"}, {"role": "assistant"}]
    assert one["later"](text="y" * 5000) == "y" * 5000
    log.gather_calls(calls)

    journal = Journal(tmp_path, names=(*LOG_FILES, *TOOL_LOG_FILES))
    log.write(journal, 1)
    log.write(journal, 2)  # the second call writes nothing
    journal.close()
    rows, times = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in TOOL_LOG_FILES
    )
    assert [(r["step"], r["completion"], r["turn"], r["call"], r["tool"]) for r in rows] == [
        (1, 4, 1, 1, "measure"), (1, 4, 1, 2, "measure"), (1, 4, 2, 1, "later"),
        (1, 5, 1, 1, "nothing"),
    ]  # fmt: skip
    assert [row["failed"] for row in rows] == [False, True, False, True]
    assert rows[0]["arguments"] == {"text": "four"}
    assert rows[1]["result"] == "the arguments are not a mapping of names to values"
    assert rows[2]["result"] == "y" * MAX_RESULT_CHARACTERS + "... (5000 characters)"
    assert [set(row) - {"time_s"} for row in times] == [
        {"step", "completion", "turn", "call", "tool"}
    ] * 4
    assert times[0]["time_s"] > 0
