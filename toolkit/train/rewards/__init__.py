"""Reward functions: the built-in ones, those of the user, and what happens if a reward fails."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from toolkit.config.build_config import thaw
from toolkit.config.environments import ADAPTERS
from toolkit.config.reward_table import reward_metric_names
from toolkit.train.rewards.error_policy import BAD_REWARDS_FILE, ErrorPolicy, GuardedReward, guard
from toolkit.train.rewards.mathverify import MathVerify
from toolkit.train.rewards.openenv import OpenEnv
from toolkit.train.rewards.reward_factory import BUILTINS, make_function
from toolkit.train.rewards.verifiers_tasks import Verifiers
from toolkit.train.rewards.worker_process import Workers
from toolkit.train.rewards.worker_rewards import RemoteMathVerify, RemoteReward

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from toolkit.config.run_config import RewardFunction, RunConfig

__all__ = ["BUILTINS", "GuardedReward", "Rewards", "load_rewards"]


class Rewards(NamedTuple):
    """The reward functions of a run and their weights, in the order of the run file."""

    functions: list[GuardedReward]
    weights: list[float]


def load_rewards(
    config: RunConfig,
    run_dir: Path,
    *,
    columns: Sequence[str] | None = None,
    workers: Workers | None = None,
) -> Rewards:
    """Build every reward of a run file. Each reward gets the error policy of the run file.

    Samples on which a reward fails are saved in ``run_dir``. With ``reward.isolate``, the user's
    reward functions and the built-in reward math_verify run in a worker process of ``workers``. If
    ``workers`` is None, a new worker process is used. ``columns`` are the names of the dataset's
    columns, including ``answer``. If ``columns`` is given, a reward that needs a missing column is
    rejected before the first step.

    Raises ConfigError, or MissingExtraError if math_verify's package is not installed.
    """
    section = config.reward
    policy = ErrorPolicy(section.on_error, section.timeout_s, run_dir / BAD_REWARDS_FILE)
    workers = workers or Workers.create(config.environment.python if config.environment else None)
    functions = [_build(entry, config, columns, workers) for entry in section.functions]
    names = reward_metric_names([entry.name for entry in section.functions])
    return Rewards(
        [guard(name, function, policy) for name, function in zip(names, functions, strict=True)],
        [entry.weight for entry in section.functions],
    )


def _build(
    entry: RewardFunction,
    config: RunConfig,
    columns: Sequence[str] | None,
    workers: Workers,
) -> Callable[..., Any] | RemoteReward:
    folder = Path(config.source).resolve().parent if config.source else Path.cwd()
    section = config.environment
    is_environment_reward = entry.name in ADAPTERS and entry.name != OpenEnv.name
    uses_other_python = is_environment_reward and section is not None and section.python is not None
    isolate = config.reward.isolate or uses_other_python
    # Code of the user is imported only in the worker.
    is_user_code = ":" in entry.name or entry.name == Verifiers.name or uses_other_python
    local_function = None
    if not is_user_code or not isolate:
        local_function = make_function(entry, config.runtime.allow_code, folder, columns)
    if not isolate or not (
        is_user_code or is_environment_reward or isinstance(local_function, MathVerify)
    ):
        assert local_function is not None
        return local_function
    request = {
        "name": entry.name,
        "options": thaw(entry.options),
        "allow_code": list(config.runtime.allow_code),
        "folder": str(folder),
        "columns": None if columns is None else list(columns),
    }
    seed = int(config.grpo.get("seed", 0))  # any constant works if the run file does not set a seed
    if isinstance(local_function, MathVerify):
        return RemoteMathVerify(workers.rewards, request, seed, local_function)
    return RemoteReward(
        workers.environment if is_environment_reward else workers.rewards, request, seed
    )
