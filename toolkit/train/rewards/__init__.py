"""Rewards: the built-in ones, the user's, and the policy around both."""

from __future__ import annotations

import difflib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from toolkit.base.errors import ConfigError
from toolkit.config.reward_table import metric_names
from toolkit.train.rewards.builtin import (
    Compared,
    ExactMatch,
    Format,
    LengthPenalty,
    NumericMatch,
    RegexMatch,
)
from toolkit.train.rewards.mathverify import MathVerify
from toolkit.train.rewards.options import build
from toolkit.train.rewards.policy import BAD_REWARDS_FILE, GuardedReward, Policy, guard
from toolkit.train.rewards.user import load_function, missing_columns

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from toolkit.config.model import RewardFunction, RunConfig

__all__ = ["BUILTINS", "GuardedReward", "Rewards", "load_rewards"]

BUILTINS: dict[str, type[Any]] = {
    kind.name: kind
    for kind in (ExactMatch, NumericMatch, RegexMatch, Format, LengthPenalty, MathVerify)
}


class Rewards(NamedTuple):
    """The reward functions of a run and their weights, in the run file's order."""

    functions: list[GuardedReward]
    weights: list[float]


def load_rewards(
    config: RunConfig, run_dir: Path, *, columns: Sequence[str] | None = None
) -> Rewards:
    """Build every reward of a run file, each under its policy; bad samples go to ``run_dir``.

    ``columns`` are the dataset's (with ``answer``): where they are given, a reward that needs one
    that is not there is refused now and not in the first step. Raises ConfigError;
    MissingExtraError for math_verify without its package.
    """
    folder = Path(config.source).resolve().parent if config.source else Path.cwd()
    section = config.reward
    policy = Policy(section.on_error, section.timeout_s, run_dir / BAD_REWARDS_FILE)
    functions = [
        _build(wanted, config.runtime.allow_code, folder, columns) for wanted in section.functions
    ]
    names = metric_names([wanted.name for wanted in section.functions])
    return Rewards(
        [guard(name, function, policy) for name, function in zip(names, functions, strict=True)],
        [wanted.weight for wanted in section.functions],
    )


def _build(
    wanted: RewardFunction,
    allow_code: Sequence[str],
    folder: Path,
    columns: Sequence[str] | None,
) -> Callable[..., Any]:
    options = dict(wanted.options)
    there = None if columns is None else {*columns} - {"prompt"}
    if ":" not in wanted.name:
        reward: Callable[..., Any] = build(wanted.name, _kind(wanted.name), options)
        if there is not None and isinstance(reward, Compared) and reward.column not in there:
            raise _no_column(wanted.name, [reward.column], there)
        return reward
    function = load_function(wanted.name, allow_code, folder)
    if there is not None:
        both = sorted(there & set(options))
        if both:
            raise ConfigError(f"reward {wanted.name}: option {both[0]} is also a dataset column")
        missing = missing_columns(function, there | set(options))
        if missing:
            raise _no_column(wanted.name, missing, there)
    return partial(function, **options) if options else function


def _kind(name: str) -> type[Any]:
    if name in BUILTINS:
        return BUILTINS[name]
    near = difflib.get_close_matches(name, BUILTINS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(
        f"there is no reward {name!r}",
        fix=f"{hint}Built in: {', '.join(BUILTINS)}; your own is written module:function",
    )


def _no_column(reward: str, missing: list[str], there: set[str]) -> ConfigError:
    names = ", ".join(sorted(there)) or "none"
    word = "column" if len(missing) == 1 else "columns"
    fix = "set dataset.answer to the column that holds the answers"
    return ConfigError(
        f"reward {reward} needs the {word} {', '.join(missing)}; the dataset passes on: {names}",
        fix=fix if "answer" in missing else "add it to the dataset, or give it a default",
    )
