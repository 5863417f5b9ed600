"""Log the tool calls of rollouts. Arguments and results are written to tool_calls.jsonl, and the
seconds of each call to tool_timings.jsonl.

The rows of these files are kept in memory until the optimizer step is logged. If a step is
abandoned, none of its rows are written. Therefore a resumed run writes the same tool_calls.jsonl as
a run that was not stopped.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object

from toolkit.engine.mesh import run_on_first
from toolkit.train.rewards.loggable_values import safe_text, to_safe_json
from toolkit.train.rollout.tools import CallFailed, StopRun, Tool

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Protocol

    from toolkit.train.report.metrics_log import Journal

    class ToolOwner(Protocol):
        """The attribute of the trainer that this module uses: the tools of each row."""

        tools_by_row: list[dict[str, Any]]


CALLS_FILE, TIMINGS_FILE = "tool_calls.jsonl", "tool_timings.jsonl"
MAX_RESULT_CHARACTERS = 2000
"""The maximum number of characters of a result in tool_calls.jsonl."""
_NOT_A_MAPPING = "the arguments are not a mapping of names to values"


@dataclass
class ToolCall:
    """One call of a tool by the model.

    The object is created when TRL looks up the tool by its name. So a call is logged even if its
    arguments are not a mapping, and the tool cannot be called with them.
    """

    tool: str
    completion: int
    turn: int
    number: int
    arguments: Any = None
    result: str = _NOT_A_MAPPING
    failed: bool = True
    time_s: float = 0.0

    def rows(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the row of this call for tool_calls.jsonl, and its row for tool_timings.jsonl."""
        key = {
            "step": step,
            "completion": self.completion,
            "turn": self.turn,
            "call": self.number,
            "tool": safe_text(self.tool, 200),
        }
        outcome = {"arguments": to_safe_json(self.arguments), "failed": self.failed}
        result = safe_text(self.result, MAX_RESULT_CHARACTERS)
        return {**key, **outcome, "result": result}, {**key, "time_s": round(self.time_s, 4)}


class ToolLog:
    """Collects the tool calls until ``write`` writes them to the log files."""

    def __init__(self) -> None:
        self._calls: list[ToolCall] = []

    def record_calls(
        self, trainer: ToolOwner, completions: list[list[Any]], numbers: list[int], step: int
    ) -> list[ToolCall]:
        """Wrap the tools in ``trainer.tools_by_row``, so that their calls are recorded. Return the
        list to which the calls are added.

        ``completions`` are the completions of this rank. ``numbers`` has the position of each of
        them in the batch of all ranks.
        """
        calls: list[ToolCall] = []
        trainer.tools_by_row = [
            _RecordedTools(tools, calls, messages, (step, number))
            for tools, messages, number in zip(
                trainer.tools_by_row, completions, numbers, strict=True
            )
        ]
        return calls

    def gather_calls(self, calls: list[ToolCall]) -> None:
        """Gather the ``calls`` of all ranks, and keep them until ``write``. Every rank must call
        this method.
        """
        all_calls = gather_object(calls)
        self._calls += sorted(all_calls, key=lambda call: (call.completion, call.turn, call.number))

    def write(self, journal: Journal, step: int) -> None:
        """Append the collected calls to the log files of the run. Raises OSError."""
        calls, self._calls = self._calls, []
        for call in calls:
            row, timing = call.rows(step)
            journal.write(CALLS_FILE, row)
            journal.write(TIMINGS_FILE, timing)


class _RecordedTools(dict[str, Any]):
    """The tools of one row of the batch, by their names. Each call of a tool is logged.

    TRL 1.16 checks ``name in tools``, then calls ``tools[name](**arguments)``. If the call raises
    an exception, its text becomes the answer to the model. Here ``name in tools`` is always True,
    so that calls of unknown tools are logged too.
    """

    def __init__(
        self,
        tools: Mapping[str, Any],
        calls: list[ToolCall],
        messages: list[Any],
        step_and_completion: tuple[int, int],
    ) -> None:
        super().__init__(tools)
        self._calls, self._messages, self._step_and_completion = (
            calls,
            messages,
            step_and_completion,
        )
        self._last_call = (0, 0)

    def __contains__(self, name: object) -> bool:
        return True

    def __getitem__(self, name: str) -> Any:
        step, completion = self._step_and_completion
        turn = sum(message.get("role") == "assistant" for message in self._messages)
        number = self._last_call[1] + 1 if self._last_call[0] == turn else 1
        self._last_call = (turn, number)
        call = ToolCall(str(name), completion, turn, number)
        self._calls.append(call)
        tool = self.get(name)

        def run_tool(**arguments: Any) -> str:
            call.arguments = arguments
            begin = perf_counter()
            failed, text = run_on_first(
                lambda: _call_tool(tool, call, (step, completion, turn, number))
            )
            call.time_s = perf_counter() - begin
            if isinstance(failed, BaseException):
                raise failed
            call.failed, call.result = bool(failed), text
            if failed:
                raise CallFailed(text)
            return str(text)

        return run_tool


def _call_tool(tool: Tool | None, call: ToolCall, position: tuple[int, ...]) -> tuple[Any, str]:
    """Call ``tool`` with the arguments of ``call``. Return (whether the call failed, answer to the
    model). If the run must end, return (exception, "") instead.
    """
    if tool is None:
        return True, f"Tool {call.tool} not found."
    try:
        return False, tool.answer(call.arguments, position)
    except CallFailed as error:
        return True, str(error)
    except StopRun as error:
        return error, ""
