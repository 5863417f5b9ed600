"""Use the problems of reasoning-gym as rows of a dataset, and its scorers as a reward."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

from toolkit.base.errors import ConfigError, MissingExtraError, first_line
from toolkit.config.build_config import thaw
from toolkit.train.rewards.builtin import text_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from toolkit.train.rewards.builtin import Score

PROBLEM_COLUMN = "problem"
"""The column that identifies the problem of a row: JSON with its seed, index and size."""
_MAX_CACHED_DATASETS = 8  # the number of datasets (one per split) that stay in memory for scoring


def generate_rows(
    task: str, settings: Mapping[str, Any], *, seed: int, size: int
) -> list[dict[str, Any]]:
    """Return ``size`` problems of a task, as rows ``{prompt, answer, problem}`` of a dataset.

    The same seed always gives the same rows.

    Raises:
        ConfigError: the task does not exist, or it does not accept these settings.
        MissingExtraError: the package is not installed.
    """
    dataset = _dataset(task, json.dumps(thaw(settings), sort_keys=True), seed, size)
    rows = []
    for index in range(size):
        entry = dataset[index]
        problem_id = json.dumps({"seed": seed, "index": index, "size": size})
        rows.append(
            {
                "prompt": entry["question"],
                "answer": str(entry["answer"]),
                PROBLEM_COLUMN: problem_id,
            }
        )
    return rows


@dataclass(frozen=True, kw_only=True)
class ReasoningGym:
    """The score, 0 to 1, that the task itself computes for the answer in a completion.

    The answer is the text in ``<answer>`` tags, or the whole completion if there are no such tags.
    For scoring, the problem is generated again from the row's seed and index.
    """

    name: ClassVar[str] = "reasoning_gym"
    task: str
    settings: dict[str, Any] | None = None

    def __call__(
        self, /, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[Score]:
        del prompts
        settings = json.dumps(thaw(self.settings or {}), sort_keys=True)
        return [
            self._score(text_of(completion), json.loads(problem_id), settings)
            for completion, problem_id in zip(completions, columns[PROBLEM_COLUMN], strict=True)
        ]

    def _score(self, text: str, problem_id: dict[str, int], settings: str) -> float:
        dataset = _dataset(self.task, settings, problem_id["seed"], problem_id["size"])
        answer = _import_package().utils.extract_answer(text) or text.strip()
        return float(dataset.score_answer(answer=answer, entry=dataset[problem_id["index"]]))


def _import_package() -> Any:
    try:
        import reasoning_gym  # noqa: PLC0415 - an optional dependency of this adapter
    except ImportError as error:
        raise MissingExtraError(
            "environment.adapter: reasoning_gym needs the package reasoning-gym, which is not "
            "installed",
            fix="run `pip install reasoning-gym`",
        ) from error
    return reasoning_gym


@lru_cache(maxsize=_MAX_CACHED_DATASETS)
def _dataset(task: str, settings: str, seed: int, size: int) -> Any:
    package = _import_package()
    tasks = package.factory.DATASETS
    if task not in tasks:
        suggestions = difflib.get_close_matches(task, tasks, n=1)
        raise ConfigError(
            f"reasoning_gym has no task {task!r}",
            where="environment.task",
            fix=f"did you mean {suggestions[0]}?"
            if suggestions
            else f"use one of: {', '.join(sorted(tasks))}",
        )
    try:
        return package.create_dataset(task, seed=seed, size=size, **json.loads(settings))
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"the task {task} does not accept these settings: {first_line(error)}",
            where="environment.options",
            fix="use only fields of the task's config class, which reasoning-gym documents",
        ) from error
