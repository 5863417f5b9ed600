"""Rewards that run in the worker process. They are called in the same way as other rewards."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from toolkit.base.errors import ConfigError, ToolkitError
from toolkit.base.time_limits import OutOfTime
from toolkit.train.rewards import wire
from toolkit.train.rewards.attempt import Batch
from toolkit.train.rewards.replies import is_trouble
from toolkit.train.rewards.returned import Misbehaved, Trouble, checked
from toolkit.train.rewards.worker_process import INVALID, Died, WorkerProcess

if TYPE_CHECKING:
    from toolkit.train.rewards.builtin import Score
    from toolkit.train.rewards.mathverify import MathVerify

LOGS = ("log_metric", "log_extra")
FIX = "set `reward.isolate: false` to call the reward in the training process"


class RemoteReward:
    """A reward function that runs in the process ``worker``.

    ``request`` contains the name and the options of the reward. ``seed`` is the seed of the run.
    """

    # The worker stops a call at its time limit, and then has this many seconds to reply before the
    # run kills it.
    kill_s = 2.0

    def __init__(self, worker: WorkerProcess, request: dict[str, Any], seed: int) -> None:
        self._worker, self._name = worker, request["name"]
        self._seed = f"{seed} {self._name}"
        try:
            made = worker.load(request)
        except Died as error:
            raise ConfigError(
                f"reward {self._name} {error} while its module was imported", fix=FIX
            ) from error
        except TypeError as error:
            raise ConfigError(
                f"reward {self._name}: an option has a value that cannot be sent to the worker "
                f"process (type {error})",
                fix=FIX,
            ) from error
        if "function" not in made:
            what = made["misbehaved"][0]
            raise ConfigError(f"reward {self._name} {what} while its module was imported")
        self._function, self.is_async = made["function"], bool(made["is_async"])

    def attempt(self, batch: Batch, seconds: float | None) -> list[Score | Trouble]:
        """Call the reward in the worker process. Return one item per completion: its score, or a
        Trouble. Raises Misbehaved and ToolkitError, as ``attempt.attempt`` does.
        """
        try:
            return self._ask(batch, seconds)
        except OutOfTime:
            raise Misbehaved(Trouble(f"took longer than {seconds:g} s")) from None
        except Died as error:
            raise Misbehaved(Trouble(str(error))) from error

    def _ask(self, batch: Batch, seconds: float | None) -> list[Score | Trouble]:
        state = batch.columns.get("trainer_state")
        columns = {k: v for k, v in batch.columns.items() if k not in (*LOGS, "trainer_state")}
        with suppress(KeyError, TypeError, OverflowError):
            columns["completion_ids"] = wire.TokenIds(columns["completion_ids"])
        request = {
            "function": self._function,
            "seconds": seconds,
            "seed": self._seed,
            "prompts": batch.prompts,
            "completions": batch.completions,
            "columns": columns,
            "state": None if state is None else _fields(state),
            "logs": [name for name in LOGS if name in batch.columns],
        }
        try:
            reply = self._worker.call(request, None if seconds is None else seconds + self.kill_s)
        except ToolkitError:
            raise
        except (TypeError, ValueError) as error:
            raise self._cannot_travel(batch, error) from error
        try:
            return _read(reply, batch)
        except (KeyError, TypeError, ValueError) as error:
            raise Misbehaved(Trouble(INVALID)) from error

    def _cannot_travel(self, batch: Batch, error: Exception) -> ConfigError:
        values = {"prompt": batch.prompts, "completion": batch.completions, **batch.columns}
        bad = next((name for name, value in values.items() if not _travels(value)), "a column")
        return ConfigError(
            f"reward {self._name}: the column {bad} has a value that cannot be sent to the worker "
            f"process ({error})",
            fix=FIX,
        )


class RemoteMathVerify(RemoteReward):
    """The reward math_verify in the worker process. Each request contains one comparison.

    If a comparison exceeds its time limit and cannot be interrupted, the worker is killed. Only
    this comparison then scores 0.
    """

    def __init__(
        self, worker: WorkerProcess, request: dict[str, Any], seed: int, like: MathVerify
    ) -> None:
        super().__init__(worker, request, seed)
        self._like = like

    def _ask(self, batch: Batch, seconds: float | None) -> list[Score | Trouble]:
        deadline = None if seconds is None else time.monotonic() + seconds
        kept = {k: v for k, v in batch.columns.items() if k == self._like.column}
        batch = Batch(batch.prompts, batch.completions, kept)
        found: list[Score | Trouble] = []
        for index in range(len(batch.completions)):
            if deadline is not None and time.monotonic() > deadline:
                raise OutOfTime
            try:
                found += super()._ask(batch.only(index), self._like.seconds_each)
            except OutOfTime:
                found.append(0.0)
            except Misbehaved as error:
                found.append(error.trouble)
        return found


def _read(reply: dict[str, Any], batch: Batch) -> list[Score | Trouble]:
    """Return the scores in ``reply``, and log the values that the reward logged. Raises TypeError
    or ValueError if the reply is invalid.
    """
    for name, key, value in reply.get("logged", ()):
        if name not in LOGS or name not in batch.columns or not isinstance(key, str):
            raise ValueError
        batch.columns[name](key, value)
    if "misbehaved" in reply:
        raise Misbehaved(Trouble(*reply["misbehaved"]))
    found = [_score(value) for value in reply["found"]]
    if len(found) != len(batch.completions):
        raise ValueError
    return found


def _score(value: Any) -> Score | Trouble:
    if not isinstance(value, list):
        return checked([value], 1)[0]
    if not is_trouble(value):
        raise ValueError
    return Trouble(*value)


def _fields(state: Any) -> dict[str, Any]:
    """The fields of a TrainerState that can be sent to the worker process."""
    return {name: value for name, value in vars(state).items() if _travels(value)}


def _travels(value: Any) -> bool:
    try:
        wire.pack(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True
