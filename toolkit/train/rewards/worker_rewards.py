"""Rewards that run in the worker process. They are called in the same way as other rewards."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from toolkit.base.errors import ConfigError, ToolkitError
from toolkit.base.time_limits import OutOfTime
from toolkit.train.rewards import worker_channel
from toolkit.train.rewards.reward_call import Batch
from toolkit.train.rewards.score_checks import Failure, UserCodeFailed, check_scores
from toolkit.train.rewards.worker_process import INVALID_REPLY, WorkerFailed, WorkerProcess
from toolkit.train.rewards.worker_replies import is_failure

if TYPE_CHECKING:
    from toolkit.train.rewards.builtin import Score
    from toolkit.train.rewards.mathverify import MathVerify

LOG_FUNCTIONS = ("log_metric", "log_extra")
NO_ISOLATION_FIX = "set `reward.isolate: false` to call the reward in the training process"


class RemoteReward:
    """A reward function that runs in the process ``worker``.

    ``request`` contains the name and the options of the reward. ``seed`` is the seed of the run.
    """

    # The worker stops a call at its time limit, and then has this many seconds to reply before the
    # run kills it.
    reply_grace_s = 2.0

    def __init__(self, worker: WorkerProcess, request: dict[str, Any], seed: int) -> None:
        self._worker, self._name = worker, request["name"]
        self._seed = f"{seed} {self._name}"
        try:
            reply = worker.load(request)
        except WorkerFailed as error:
            raise ConfigError(
                f"reward {self._name} {error} while its module was imported", fix=NO_ISOLATION_FIX
            ) from error
        except TypeError as error:
            raise ConfigError(
                f"reward {self._name}: an option has a value that cannot be sent to the worker "
                f"process (type {error})",
                fix=NO_ISOLATION_FIX,
            ) from error
        if "function" not in reply:
            description = reply["misbehaved"][0]
            raise ConfigError(f"reward {self._name} {description} while its module was imported")
        self._function, self.is_async = reply["function"], bool(reply["is_async"])

    def call(self, batch: Batch, seconds: float | None) -> list[Score | Failure]:
        """Call the reward in the worker process. Return one item per completion: its score, or a
        Failure. Raises UserCodeFailed and ToolkitError, as ``reward_call.call_reward`` does.
        """
        try:
            return self._request_scores(batch, seconds)
        except OutOfTime:
            raise UserCodeFailed(Failure(f"took longer than {seconds:g} s")) from None
        except WorkerFailed as error:
            raise UserCodeFailed(Failure(str(error))) from error

    def _request_scores(self, batch: Batch, seconds: float | None) -> list[Score | Failure]:
        trainer_state = batch.columns.get("trainer_state")
        columns = {
            k: v for k, v in batch.columns.items() if k not in (*LOG_FUNCTIONS, "trainer_state")
        }
        with suppress(KeyError, TypeError, OverflowError):
            columns["completion_ids"] = worker_channel.TokenIds(columns["completion_ids"])
        request = {
            "function": self._function,
            "seconds": seconds,
            "seed": self._seed,
            "prompts": batch.prompts,
            "completions": batch.completions,
            "columns": columns,
            "state": None if trainer_state is None else _sendable_fields(trainer_state),
            "logs": [name for name in LOG_FUNCTIONS if name in batch.columns],
        }
        try:
            reply = self._worker.call(
                request, None if seconds is None else seconds + self.reply_grace_s
            )
        except ToolkitError:
            raise
        except (TypeError, ValueError) as error:
            raise self._unsendable_column_error(batch, error) from error
        try:
            return _read_reply(reply, batch)
        except (KeyError, TypeError, ValueError) as error:
            raise UserCodeFailed(Failure(INVALID_REPLY)) from error

    def _unsendable_column_error(self, batch: Batch, error: Exception) -> ConfigError:
        values = {"prompt": batch.prompts, "completion": batch.completions, **batch.columns}
        column = next((name for name, value in values.items() if not _can_send(value)), "a column")
        return ConfigError(
            f"reward {self._name}: the column {column} has a value that cannot be sent to the "
            f"worker process ({error})",
            fix=NO_ISOLATION_FIX,
        )


class RemoteMathVerify(RemoteReward):
    """The reward math_verify in the worker process. Each request contains one comparison.

    If a comparison exceeds its time limit and cannot be interrupted, the worker is killed. Only
    this comparison then scores 0.
    """

    def __init__(
        self, worker: WorkerProcess, request: dict[str, Any], seed: int, reward: MathVerify
    ) -> None:
        super().__init__(worker, request, seed)
        self._reward = reward

    def _request_scores(self, batch: Batch, seconds: float | None) -> list[Score | Failure]:
        deadline = None if seconds is None else time.monotonic() + seconds
        answer_columns = {k: v for k, v in batch.columns.items() if k == self._reward.column}
        batch = Batch(batch.prompts, batch.completions, answer_columns)
        results: list[Score | Failure] = []
        for index in range(len(batch.completions)):
            if deadline is not None and time.monotonic() > deadline:
                raise OutOfTime
            try:
                results += super()._request_scores(batch.sample(index), self._reward.seconds_each)
            except OutOfTime:
                results.append(0.0)
            except UserCodeFailed as error:
                results.append(error.failure)
        return results


def _read_reply(reply: dict[str, Any], batch: Batch) -> list[Score | Failure]:
    """Return the scores in ``reply``, and log the values that the reward logged. Raises TypeError
    or ValueError if the reply is invalid.
    """
    for name, key, value in reply.get("logged", ()):
        if name not in LOG_FUNCTIONS or name not in batch.columns or not isinstance(key, str):
            raise ValueError
        batch.columns[name](key, value)
    if "misbehaved" in reply:
        raise UserCodeFailed(Failure(*reply["misbehaved"]))
    scores = [_read_score(value) for value in reply["found"]]
    if len(scores) != len(batch.completions):
        raise ValueError
    return scores


def _read_score(value: object) -> Score | Failure:
    if not isinstance(value, list):
        return check_scores([value], 1)[0]
    if not is_failure(value):
        raise ValueError
    return Failure(*value)


def _sendable_fields(trainer_state: Any) -> dict[str, Any]:
    """The fields of a TrainerState that can be sent to the worker process."""
    return {name: value for name, value in vars(trainer_state).items() if _can_send(value)}


def _can_send(value: object) -> bool:
    try:
        worker_channel.pack(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True
