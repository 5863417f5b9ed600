"""A reward function from its entry in the run file: a built-in one, or the user's."""

from __future__ import annotations

from dataclasses import MISSING, fields
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from toolkit.base import did_you_mean
from toolkit.base.errors import ConfigError
from toolkit.config.code import is_allowed
from toolkit.config.environments import ADAPTERS
from toolkit.train.rewards.builtin import (
    Compared,
    ExactMatch,
    Format,
    LengthPenalty,
    NumericMatch,
    RegexMatch,
)
from toolkit.train.rewards.mathverify import MathVerify
from toolkit.train.rewards.reasoning_gym import COLUMN, ReasoningGym
from toolkit.train.rewards.user import load_function, missing_columns

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from toolkit.config.run_config import RewardFunction

# The types that the rewards' fields have, as they are written there -> what a run file may give.
_ACCEPTED: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "str | None": (str, type(None)),
    "bool": (bool,),
    "int": (int,),
    "float": (float, int),
    "float | None": (float, int, type(None)),
    "tuple[str, ...]": (list, tuple),
    "dict[str, Any] | None": (dict, MappingProxyType, type(None)),
}


def build(name: str, kind: type[Any], options: dict[str, Any]) -> Any:
    """``kind(**options)``; ConfigError names an unknown, a missing or an ill-typed option."""
    types = {field.name: str(field.type) for field in fields(kind)}
    for option, value in options.items():
        if option not in types:
            near = did_you_mean.near(option, types, cutoff=0.6)
            raise ConfigError(
                f"reward {name} has no option {option!r}",
                fix=f"did you mean {near[0]}?" if near else f"it has: {', '.join(types)}",
            )
        _check(name, option, value, types[option])
    for field in fields(kind):
        if field.default is MISSING and field.name not in options:
            raise ConfigError(f"reward {name} needs the option {field.name}")
    given = {key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}
    return kind(**given)


def _check(name: str, option: str, value: Any, wanted: str) -> None:
    accepted = _ACCEPTED[wanted]
    right = isinstance(value, accepted) and (bool in accepted or not isinstance(value, bool))
    if right and wanted == "tuple[str, ...]":
        right = all(isinstance(item, str) for item in value)
    if not right:
        words = wanted.replace("tuple[str, ...]", "list of texts").replace("str", "text")
        raise ConfigError(f"reward {name}: option {option} must be {words}, not {value!r}")


BUILTINS: dict[str, type[Any]] = {
    kind.name: kind
    for kind in (
        ExactMatch,
        NumericMatch,
        RegexMatch,
        Format,
        LengthPenalty,
        MathVerify,
        ReasoningGym,
    )
}


def make_function(
    wanted: RewardFunction,
    allow_code: Sequence[str],
    folder: Path,
    columns: Sequence[str] | None,
) -> Callable[..., Any]:
    """The callable of ``wanted``; ``folder`` is the run file's, ``columns`` are the dataset's.

    Raises ConfigError; MissingExtraError for math_verify without its package.
    """
    options = dict(wanted.options)
    there = None if columns is None else {*columns} - {"prompt"}
    if ":" not in wanted.name:
        reward: Callable[..., Any] = build(wanted.name, _kind(wanted.name), options)
        if there is not None and isinstance(reward, Compared) and reward.column not in there:
            raise _no_column(wanted.name, [reward.column], there)
        if isinstance(reward, ReasoningGym):
            _refuse_package(wanted.name, allow_code)
            if there is not None and COLUMN not in there:
                raise _no_column(wanted.name, [COLUMN], there)
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


def _refuse_package(name: str, allow_code: Sequence[str]) -> None:
    module = ADAPTERS[name].modules[0]
    if not is_allowed(module, allow_code):
        raise ConfigError(
            f"the environment {name} is code, and runtime.allow_code does not allow its module",
            fix=f"runtime: {{allow_code: [{module}]}}, if you trust it",
        )


def _kind(name: str) -> type[Any]:
    if name in BUILTINS:
        return BUILTINS[name]
    near = did_you_mean.near(name, BUILTINS, cutoff=0.6)
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
