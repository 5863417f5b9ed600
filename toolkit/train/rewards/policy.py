"""What is done when a reward misbehaves: it raises, hangs, or returns what is no reward.

``fail`` stops the run with the sample saved; ``none`` scores that sample None (TRL leaves it out
of the mean) and counts it. Either way the guilty sample is looked for: a reward is called with
the whole batch, and only where that fails with one sample at a time.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from toolkit.base.errors import ConfigError, ToolkitError
from toolkit.base.paths import append_line, make_folder
from toolkit.base.secrets import redact, redact_tree
from toolkit.train.rewards.limits import LoopThread, OutOfTime, call_within
from toolkit.train.rewards.returned import Misbehaved, Trouble, checked, raised

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from toolkit.train.rewards.builtin import Score

BAD_REWARDS_FILE = "bad_rewards.jsonl"
MAX_SAVED = 200  # samples a reward function, so that a broken one does not fill the disk
SEARCH_FACTOR = 4  # looking for the samples that hang may take this many times timeout_s


@dataclass(frozen=True)
class Policy:
    """``on_error`` and ``timeout_s`` of the run file's reward section; the file for samples."""

    on_error: Literal["fail", "none"] = "fail"
    timeout_s: float | None = None
    file: Path | None = None


class Batch(NamedTuple):
    """What a reward is called with."""

    prompts: list[Any]
    completions: list[Any]
    columns: dict[str, Any]

    def only(self, index: int) -> Batch:
        """The sample at ``index`` as a batch of one; what the function logs is then dropped."""
        size = len(self.completions)
        columns = {
            key: [value[index]] if isinstance(value, list) and len(value) == size else value
            for key, value in self.columns.items()
        }
        columns |= {key: _drop for key in ("log_extra", "log_metric") if key in columns}
        return Batch([self.prompts[index]], [self.completions[index]], columns)


class GuardedReward:
    """A reward function under a Policy, as TRL calls it. ``__name__`` names its metrics."""

    def __init__(self, name: str, function: Callable[..., Any], policy: Policy) -> None:
        self.__name__ = name
        self.function, self.policy = function, policy
        self._saved = 0
        self._loop = LoopThread()

    def __call__(
        self, /, prompts: list[Any], completions: list[Any], **columns: Any
    ) -> list[Score]:
        """One reward (or None) a completion; ConfigError under ``fail``."""
        return self.scores(Batch(prompts, completions, columns))

    def score(self, /, prompts: list[Any], completions: list[Any], **columns: Any) -> list[Score]:
        """The same outside of training, async or not: what TRL passes besides is made up here."""
        from transformers import TrainerState  # noqa: PLC0415 - heavy, and only needed here

        passed = {"trainer_state": TrainerState(), "log_extra": _drop, "log_metric": _drop}
        return self.scores(Batch(prompts, completions, {**passed, **columns}))

    def scores(self, batch: Batch) -> list[Score]:
        """The whole of it: call, search if that failed, settle what is wrong, count."""
        try:
            found = self._attempt(batch, self.policy.timeout_s)
        except Misbehaved as error:
            found = self._one_by_one(batch, error.trouble)
        for index, value in enumerate(found):
            if isinstance(value, Trouble):
                self._settle(batch, index, value)
        if self.policy.on_error == "none" and "log_metric" in batch.columns:
            failed = sum(isinstance(value, Trouble) for value in found)
            batch.columns["log_metric"](f"rewards/{self.__name__}/failed", failed / len(found))
        return [None if isinstance(value, Trouble) else value for value in found]

    def _attempt(self, batch: Batch, seconds: float | None) -> list[Score | Trouble]:
        """Call the function; each value is checked. Raises Misbehaved."""
        try:
            returned = self._call(batch, seconds)
        except ToolkitError:
            raise  # ours: a column that is not there, an extra that is not installed
        except OutOfTime as error:
            raise Misbehaved(Trouble(str(error))) from error
        except (Exception, SystemExit) as error:
            raise Misbehaved(raised(error)) from error
        return checked(returned, len(batch.completions))

    def _call(self, batch: Batch, seconds: float | None) -> Any:
        # Copies: what one function does to its lists is not seen by the next.
        columns = {k: list(v) if isinstance(v, list) else v for k, v in batch.columns.items()}
        prompts, completions = list(batch.prompts), list(batch.completions)
        call = partial(self.function, prompts=prompts, completions=completions, **columns)
        if is_async(self.function):
            return self._loop.call_within(seconds, call())
        return call_within(seconds, call)

    def _one_by_one(self, batch: Batch, whole: Trouble) -> list[Score | Trouble]:
        """Score each sample alone. If none is guilty alone, the whole batch is."""
        limit = self.policy.timeout_s
        deadline = time.monotonic() + limit * SEARCH_FACTOR if limit is not None else math.inf
        found: list[Score | Trouble] = []
        for index in range(len(batch.completions)):
            left = deadline - time.monotonic()
            try:
                if left <= 0:
                    what = f"was not called: samples before took {SEARCH_FACTOR} x timeout_s"
                    raise Misbehaved(Trouble(what))
                seconds = None if limit is None else min(limit, left)
                found += self._attempt(batch.only(index), seconds)
            except Misbehaved as error:
                found.append(_both(whole, error.trouble))
                if self.policy.on_error == "fail":
                    break
        if any(isinstance(value, Trouble) for value in found):
            return found
        return [whole._replace(what=f"{whole.what}, though with no sample alone") for _ in found]

    def _settle(self, batch: Batch, index: int, trouble: Trouble) -> None:
        saved = self._save(batch.only(index), index, trouble)
        if self.policy.on_error == "fail":
            size = len(batch.completions)
            longer = " or raise reward.timeout_s," if "took longer than" in trouble.what else ","
            raise ConfigError(
                redact(f"reward {self.__name__} {trouble.what} (sample {index} of {size})")
                + (f"\n  saved: {saved}" if saved else ""),
                fix=f"mend the function{longer} or set reward.on_error: none to score such samples"
                " None",
            )

    def _save(self, sample: Batch, index: int, trouble: Trouble) -> str | None:
        """Append the sample to the file; return where it lies, or why it could not be saved."""
        file = self.policy.file
        if file is None or self._saved >= MAX_SAVED:
            return str(file) if file else None
        record = {
            "reward": self.__name__,
            "problem": trouble.what,
            "index": index,
            "prompt": sample.prompts[0],
            "completion": sample.completions[0],
            "columns": {k: v[0] for k, v in sample.columns.items() if isinstance(v, list)},
            "returned": trouble.returned,
            "traceback": trouble.traceback,
        }
        plain = json.loads(json.dumps(record, default=repr), parse_constant=str)
        try:
            make_folder(file.parent)
            append_line(file, json.dumps(redact_tree(plain)))
        except OSError as error:
            return f"{file} (the sample could not be saved: {error.strerror})"
        self._saved += 1
        return str(file)


class AsyncGuardedReward(GuardedReward):
    """The same for a coroutine function: TRL awaits it together with the other async rewards."""

    async def __call__(  # type: ignore[override]  # TRL asks of what kind __call__ is
        self, /, prompts: list[Any], completions: list[Any], **columns: Any
    ) -> list[Score]:
        """As GuardedReward's; runs in a worker thread, so that nobody waits for anybody."""
        return await asyncio.to_thread(self.scores, Batch(prompts, completions, columns))


def guard(name: str, function: Callable[..., Any], policy: Policy) -> GuardedReward:
    """``function`` under ``policy``, async if it is."""
    kind = AsyncGuardedReward if is_async(function) else GuardedReward
    return kind(name, function, policy)


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling it gives a coroutine, by the rule of TRL 1.16's ``is_async_callable``."""
    while isinstance(function, partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        type(function).__call__
    )


def _both(whole: Trouble, alone: Trouble) -> Trouble:
    """The trouble with one sample; where it reads otherwise than the batch's, both."""
    if alone.traceback or alone.what == whole.what:
        return alone
    return alone._replace(what=f"{whole.what}, and with this sample alone {alone.what}")


def _drop(*_: Any) -> None:
    return None
