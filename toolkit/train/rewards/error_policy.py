"""Apply the error policy ``reward.on_error`` if a reward raises, hangs, or returns an invalid
value.

A reward is called with the whole batch. If this call fails, the reward is called with one sample at
a time, to find the failing samples. They are saved to a file. Then the policy ``fail`` stops the
run. The policy ``none`` counts the failing samples and gives them the score None, which TRL leaves
out of the mean.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from toolkit.base.errors import ConfigError
from toolkit.base.paths import append_line, make_folder
from toolkit.base.secrets import redact
from toolkit.train.rewards.loggable_values import to_safe_json, with_safe_log_functions
from toolkit.train.rewards.reward_call import Batch, LoopThread, call_reward, ignore_log, is_async
from toolkit.train.rewards.score_checks import Failure, UserCodeFailed
from toolkit.train.rewards.worker_rewards import RemoteReward

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from toolkit.train.rewards.builtin import Score

BAD_REWARDS_FILE = "bad_rewards.jsonl"
MAX_SAVED_SAMPLES = (
    200  # saved samples per reward function, so that a broken function cannot fill the disk
)
SEARCH_FACTOR = 4  # the search for hanging samples may take this many times timeout_s


@dataclass(frozen=True)
class ErrorPolicy:
    """The error policy of a run. ``on_error`` and ``timeout_s`` come from the reward section of the
    run file. Failing samples are saved to ``samples_file``.
    """

    on_error: Literal["fail", "none"] = "fail"
    timeout_s: float | None = None
    samples_file: Path | None = None


class GuardedReward:
    """A reward function with an error policy, which TRL can call.

    TRL uses ``__name__`` in the names of metrics.
    """

    def __init__(
        self, name: str, function: Callable[..., Any] | RemoteReward, policy: ErrorPolicy
    ) -> None:
        self.__name__ = redact(name)
        self.function, self.policy = function, policy
        self._saved_count = 0
        self._loop = LoopThread()

    def __call__(
        self, /, prompts: list[Any], completions: list[Any], **columns: Any
    ) -> list[Score]:
        """The rewards, one float or None per completion. Raises ConfigError if a sample fails and
        the policy is ``fail``.
        """
        return self.score_batch(Batch(prompts, completions, columns))

    def score(self, /, prompts: list[Any], completions: list[Any], **columns: Any) -> list[Score]:
        """The rewards, one float or None per completion, for a call outside training.

        This method adds the arguments that only TRL passes. It also works for async functions.
        """
        from transformers import TrainerState  # noqa: PLC0415 - heavy, and only needed here

        passed = {
            "trainer_state": TrainerState(),
            "log_extra": ignore_log,
            "log_metric": ignore_log,
        }
        return self.score_batch(Batch(prompts, completions, {**passed, **columns}))

    def score_batch(self, batch: Batch) -> list[Score]:
        """Call the reward function. If it fails, find the failing samples and apply the policy.

        If ``policy.on_error`` is "none", the share of failed samples is logged as a metric.
        """
        batch = batch._replace(columns=with_safe_log_functions(batch.columns))
        try:
            results = self._call(batch, self.policy.timeout_s)
        except UserCodeFailed as error:
            results = self._call_one_by_one(batch, error.failure)
        for index, value in enumerate(results):
            if isinstance(value, Failure):
                self._apply_policy(batch, index, value)
        if self.policy.on_error == "none" and "log_metric" in batch.columns:
            failed = sum(isinstance(value, Failure) for value in results)
            batch.columns["log_metric"](f"rewards/{self.__name__}/failed", failed / len(results))
        return [None if isinstance(value, Failure) else value for value in results]

    def _call(self, batch: Batch, seconds: float | None) -> list[Score | Failure]:
        if isinstance(self.function, RemoteReward):
            return self.function.call(batch, seconds)
        return call_reward(self.function, batch, seconds, self._loop)

    def _call_one_by_one(self, batch: Batch, batch_failure: Failure) -> list[Score | Failure]:
        """Call the reward with one sample at a time. Return a score or an error per sample.

        ``batch_failure`` is the error of the call with the whole batch. If no sample fails alone,
        every sample gets the error ``batch_failure``.
        """
        timeout_s = self.policy.timeout_s
        deadline = math.inf
        if timeout_s is not None:
            reply_grace_s = (
                self.function.reply_grace_s if isinstance(self.function, RemoteReward) else 0.0
            )
            deadline = time.monotonic() + (timeout_s + reply_grace_s) * SEARCH_FACTOR
        results: list[Score | Failure] = []
        for index in range(len(batch.completions)):
            remaining_s = deadline - time.monotonic()
            try:
                if remaining_s <= 0:
                    description = (
                        f"was not called, because earlier samples took {SEARCH_FACTOR} x timeout_s"
                    )
                    raise UserCodeFailed(Failure(description))
                seconds = None if timeout_s is None else min(timeout_s, remaining_s)
                results += self._call(batch.sample(index), seconds)
            except UserCodeFailed as error:
                results.append(_combine_failures(batch_failure, error.failure))
                if self.policy.on_error == "fail":
                    break
        if any(isinstance(value, Failure) for value in results):
            return results
        return [
            batch_failure._replace(
                description=(
                    f"{batch_failure.description} with the whole batch, but not with any single "
                    "sample"
                )
            )
            for _ in results
        ]

    def _apply_policy(self, batch: Batch, index: int, failure: Failure) -> None:
        saved_to = self._save(batch.sample(index), index, failure)
        if self.policy.on_error == "fail":
            size = len(batch.completions)
            timeout_hint = (
                ", or raise reward.timeout_s," if "took longer than" in failure.description else ","
            )
            raise ConfigError(
                redact(f"reward {self.__name__} {failure.description} (sample {index} of {size})")
                + (f"\n  saved: {saved_to}" if saved_to else ""),
                fix=f"fix the function{timeout_hint} or set `reward.on_error: none` to give such "
                "samples the score None",
            )

    def _save(self, sample: Batch, index: int, failure: Failure) -> str | None:
        """Append the sample to the file of failing samples, and return the path of the file.

        If the sample could not be saved, return the path and the reason. Return None if the policy
        has no file.
        """
        file = self.policy.samples_file
        if file is None or self._saved_count >= MAX_SAVED_SAMPLES:
            return str(file) if file else None
        record = {
            "reward": self.__name__,
            "problem": failure.description,
            "index": index,
            "prompt": sample.prompts[0],
            "completion": sample.completions[0],
            "columns": {k: v[0] for k, v in sample.columns.items() if isinstance(v, list)},
            "returned": failure.returned,
            "traceback": failure.traceback,
        }
        try:
            make_folder(file.parent)
            append_line(file, json.dumps(to_safe_json(record)))
        except OSError as error:
            return f"{file} (the sample could not be saved: {error.strerror})"
        self._saved_count += 1
        return str(file)


class AsyncGuardedReward(GuardedReward):
    """A GuardedReward for an async function. TRL runs all async rewards concurrently."""

    async def __call__(  # type: ignore[override]  # TRL checks if __call__ is async
        self, /, prompts: list[Any], completions: list[Any], **columns: Any
    ) -> list[Score]:
        """Return the rewards, one float or None per completion. ``score_batch`` runs in
        another thread, so that several async rewards run at the same time.
        """
        return await asyncio.to_thread(self.score_batch, Batch(prompts, completions, columns))


def guard(
    name: str, function: Callable[..., Any] | RemoteReward, policy: ErrorPolicy
) -> GuardedReward:
    """Return a reward that applies ``policy`` to the errors of ``function``. The returned reward is
    async if ``function`` is async.
    """
    awaits_result = function.is_async if isinstance(function, RemoteReward) else is_async(function)
    reward_class = AsyncGuardedReward if awaits_result else GuardedReward
    return reward_class(name, function, policy)


def _combine_failures(batch_failure: Failure, sample_failure: Failure) -> Failure:
    """Return the error to report for a sample. ``sample_failure`` is the error of the call with
    only this sample. ``batch_failure`` is the error of the call with the whole batch.

    If the two errors differ and ``sample_failure`` has no traceback, the returned error describes
    both. Otherwise, it is ``sample_failure``.
    """
    if sample_failure.traceback or sample_failure.description == batch_failure.description:
        return sample_failure
    return sample_failure._replace(
        description=f"{batch_failure.description}, and with this sample alone "
        f"{sample_failure.description}"
    )
