"""Use the tasks of a verifiers 0.4 taskset as rows of a dataset, and score completions with the
rewards that the tasks define.

The toolkit uses two parts of a task: its prompt, and its ``@reward`` methods that score a finished
conversation of one turn (``Task.score`` without a runtime). Some tasks need more: a container, tool
servers, a simulated user, a judge model, or several agents. For these, verifiers runs servers that
a training run does not have. Such a task is rejected with the reason.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

from toolkit.base.errors import ConfigError, MissingExtraError, first_line
from toolkit.config.build_config import thaw
from toolkit.train.rewards.builtin import text_of
from toolkit.train.rewards.reasoning_gym import PROBLEM_COLUMN

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from toolkit.train.rewards.builtin import Score

SUPPORTED_TASKS_FIX = (
    "use a taskset whose tasks have a prompt and one turn, and are scored by @reward methods that "
    "read only the task and the trace (no tools, container, judge or simulated user)"
)


def generate_rows(
    task: str, options: Mapping[str, Any], *, seed: int, size: int, start: int
) -> list[dict[str, Any]]:
    """Return up to ``size`` tasks of the taskset ``task``, as rows ``{prompt, problem}`` of a
    dataset. ``start`` is the index of the first of these tasks.

    The rows also have ``answer`` if every task has an answer. A finite taskset is first shuffled
    with ``seed``, unless the seed is 0.

    Raises:
        ConfigError: the taskset does not exist, it does not accept these options, or a task needs
            more than a prompt and a score.
        MissingExtraError: the package is not installed.
    """
    taskset = _load_taskset(task, _canonical_json(options)).taskset
    ordered = taskset.shuffle(seed) if seed and taskset.bounded else taskset
    data_rows = [_data_row(task, item) for item in ordered.skip(start).take(size)]
    if not data_rows:
        raise ConfigError(
            f"the taskset {task} has no more tasks after the first {start} tasks",
            where="environment.size",
            fix="set environment.size and environment.eval_size to smaller numbers of rows",
        )
    if any(isinstance(row["prompt"], list) for row in data_rows):
        for row in data_rows:
            if isinstance(row["prompt"], str):
                row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    if not all("answer" in row for row in data_rows):
        for row in data_rows:
            row.pop("answer", None)
    return data_rows


def _data_row(taskset: str, task: Any) -> dict[str, Any]:
    _refuse_unsupported(taskset, task)
    data = task.data
    prompt = data.prompt
    if not isinstance(prompt, str):
        prompt = [_chat_message(taskset, message) for message in prompt]
    if data.system_prompt:
        chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        prompt = [{"role": "system", "content": data.system_prompt}, *chat]
    row = {"prompt": prompt, PROBLEM_COLUMN: json.dumps({"index": data.idx, "key": task.key})}
    answer = getattr(data, "answer", None)
    return row if answer is None else {**row, "answer": str(answer)}


def _chat_message(taskset: str, message: Any) -> dict[str, str]:
    if message.role not in ("system", "user", "assistant") or not isinstance(message.content, str):
        raise _unsupported_error(
            taskset,
            f"the prompt of a task has an unsupported message with the role {message.role}. Only "
            "text messages of system, user and assistant are supported",
        )
    return {"role": message.role, "content": message.content}


def _refuse_unsupported(taskset: str, task: Any) -> None:
    task_class, base_class = type(task), _import_package().Task
    needs_runtime = [hook.__name__ for hook in task.hooks("reward") if _needs_runtime(hook)]
    reasons = {
        "its tasks run in a container": task_class.NEEDS_CONTAINER or task.data.image is not None,
        "its tasks have no prompt: a simulated user opens the conversation": (
            task.data.prompt is None
        ),
        "its tasks have tool servers": bool(task_class.toolsets(task.config)),
        "its tasks are scored by a judge model": bool(task.config.judges),
        "its tasks prepare or read a sandbox (setup, finalize)": any(
            getattr(task_class, name) is not getattr(base_class, name)
            for name in ("setup", "finalize")
        ),
        f"its reward {', '.join(needs_runtime)} reads a sandbox": bool(needs_runtime),
        "its tasks have no @reward method": not task.hooks("reward"),
    }
    for reason, applies in reasons.items():
        if applies:
            raise _unsupported_error(taskset, reason)


def _needs_runtime(hook: Any) -> bool:
    parameter = inspect.signature(hook).parameters.get("runtime")
    return parameter is not None and parameter.default is parameter.empty


def _unsupported_error(taskset: str, reason: str) -> ConfigError:
    return ConfigError(
        f"the taskset {taskset} cannot be used for training: {reason}",
        where="environment.task",
        fix=SUPPORTED_TASKS_FIX,
    )


@dataclass(frozen=True, kw_only=True)
class Verifiers:
    """The reward of a completion: the weighted sum of the rewards that its task defines
    (``Trace.reward``).

    The range depends on the task. A task with one reward of weight 1 has the range of that reward,
    usually 0 to 1.
    """

    name: ClassVar[str] = "verifiers"
    task: str
    settings: dict[str, Any] | None = None

    def __call__(
        self, /, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[Score]:
        taskset = _load_taskset(self.task, _canonical_json(self.settings or {}))

        async def score() -> list[Score]:
            coroutines = (
                taskset.score(prompt, text_of(completion), json.loads(problem_id))
                for prompt, completion, problem_id in zip(
                    prompts, completions, columns[PROBLEM_COLUMN], strict=True
                )
            )
            return list(await asyncio.gather(*coroutines))

        return asyncio.run(score())


class _CachedTaskset:
    """A taskset with a cache of its loaded tasks."""

    def __init__(self, taskset: Any) -> None:
        self.taskset = taskset
        self._remaining = iter(taskset)
        self._tasks: list[Any] = []

    def task(self, problem_id: Mapping[str, Any]) -> Any:
        """Return the task of a dataset row. ``problem_id`` has the index and the key of the task.
        Raises ValueError if the taskset now has another task at this index.
        """
        index = problem_id["index"]
        self._tasks += islice(self._remaining, max(0, index + 1 - len(self._tasks)))
        if index >= len(self._tasks) or self._tasks[index].key != problem_id["key"]:
            raise ValueError(
                f"load() returns a different task at index {index} than when the run began"
            )
        return self._tasks[index]

    async def score(self, prompt: Any, completion: str, problem_id: Mapping[str, Any]) -> float:
        vf, task = _import_package(), self.task(problem_id)
        from verifiers.v1.state import state_cls  # noqa: PLC0415 - part of the optional package

        trace = vf.Trace(
            task=vf.TraceTask(
                type=type(task).__name__, data=task.data, key=task.key, hash=task.hash
            ),
            state=state_cls(type(task))(),
            agent=vf.AgentInfo(config=vf.AgentConfig()),
        )
        chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        messages = [*chat, {"role": "assistant", "content": completion}]
        trace.nodes = [
            vf.MessageNode(
                parent=None if index == 0 else index - 1,
                message=message,
                sampled=index == len(messages) - 1,
            )
            for index, message in enumerate(messages)
        ]
        await task.score(trace)
        return float(trace.reward)


def _import_package() -> Any:
    try:
        import verifiers.v1  # noqa: PLC0415 - an optional dependency of this adapter
    except ImportError as error:
        raise MissingExtraError(
            "environment.adapter is verifiers, but the package verifiers cannot be imported: "
            f"{first_line(error)}",
            fix="run pip install 'verifiers>=0.4,<0.5'",
        ) from error
    return verifiers.v1


def _canonical_json(options: Mapping[str, Any]) -> str:
    return json.dumps(thaw(options), sort_keys=True)


@lru_cache(maxsize=2)
def _load_taskset(task: str, options: str) -> _CachedTaskset:
    vf = _import_package()
    from verifiers.v1.utils import loaders  # noqa: PLC0415 - part of the optional package

    try:
        taskset_class = loaders.taskset_class(task)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"verifiers has no taskset {task}: {first_line(error)}",
            where="environment.task",
            fix="set environment.task to the id of an installed taskset package, or of a module "
            "next to the run file",
        ) from error
    try:
        config = loaders.taskset_config_type(task).model_validate(
            {**json.loads(options), "id": task}
        )
        taskset = taskset_class(config)
    except ValueError as error:
        message = "; ".join(str(error).split("\n")[:3])
        raise ConfigError(
            f"the taskset {task} does not accept these options: {message}",
            where="environment.options",
            fix="use only fields of the taskset's config class in environment.options",
        ) from error
    if taskset_class.toolsets(config):
        raise _unsupported_error(task, "it has tool servers")
    if not issubclass(vf.SingleAgentEnv, loaders.environment_class(task)):
        raise _unsupported_error(
            task, "it defines an Env class (for several agents or a simulated user)"
        )
    return _CachedTaskset(taskset)
