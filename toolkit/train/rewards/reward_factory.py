"""Build a reward function from its entry in the run file. The entry is a built-in reward or a
function of the user.
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from toolkit.base import did_you_mean
from toolkit.base.errors import ConfigError
from toolkit.train.rewards.builtin import (
    AnswerReward,
    ExactMatch,
    Format,
    LengthPenalty,
    NumericMatch,
    RegexMatch,
)
from toolkit.train.rewards.environment_code import EnvironmentCode
from toolkit.train.rewards.mathverify import MathVerify
from toolkit.train.rewards.openenv import OpenEnv
from toolkit.train.rewards.reasoning_gym import PROBLEM_COLUMN, ReasoningGym
from toolkit.train.rewards.user_reward import load_function, missing_columns
from toolkit.train.rewards.verifiers_tasks import Verifiers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from toolkit.config.run_config import RewardFunction

# Maps the annotated type of an option to the types of its value in a run file.
_VALUE_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "str | None": (str, type(None)),
    "bool": (bool,),
    "int": (int,),
    "float": (float, int),
    "float | None": (float, int, type(None)),
    "tuple[str, ...]": (list, tuple),
    "dict[str, Any] | None": (dict, MappingProxyType, type(None)),
}


def create_builtin(name: str, reward_class: type[Any], options: dict[str, Any]) -> Any:
    """Create the built-in reward ``name``, which is the class ``reward_class``, with ``options``.

    Raises ConfigError for an unknown option, a missing option or a value of the wrong type.
    """
    option_types = {field.name: str(field.type) for field in fields(reward_class)}
    for option, value in options.items():
        if option not in option_types:
            suggestions = did_you_mean.similar_words(option, option_types, cutoff=0.6)
            raise ConfigError(
                f"reward {name} has no option {option!r}",
                fix=f"did you mean {suggestions[0]}?"
                if suggestions
                else f"its options are: {', '.join(option_types)}",
            )
        _check_option(name, option, value, option_types[option])
    for field in fields(reward_class):
        if field.default is MISSING and field.name not in options:
            raise ConfigError(f"reward {name} needs the option {field.name}")
    arguments = {key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}
    return reward_class(**arguments)


def _check_option(name: str, option: str, value: Any, type_name: str) -> None:
    accepted_types = _VALUE_TYPES[type_name]
    is_valid = isinstance(value, accepted_types) and (
        bool in accepted_types or not isinstance(value, bool)
    )
    if is_valid and type_name == "tuple[str, ...]":
        is_valid = all(isinstance(item, str) for item in value)
    if not is_valid:
        type_words = type_name.replace("tuple[str, ...]", "list of texts").replace("str", "text")
        raise ConfigError(f"reward {name}: option {option} must be {type_words}, not {value!r}")


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
        Verifiers,
        OpenEnv,
    )
}
ENVIRONMENT_REWARDS = (ReasoningGym, Verifiers, OpenEnv)
"""The rewards that score the problems of an environment."""


def make_function(
    entry: RewardFunction,
    allow_code: Sequence[str],
    folder: Path,
    columns: Sequence[str] | None,
) -> Callable[..., Any]:
    """Return the reward function for ``entry``, an entry of the run file.

    ``folder`` is the folder of the run file. ``columns`` are the columns of the dataset, or None if
    they are not known yet. Raises ConfigError, or MissingExtraError if math_verify's package is not
    installed.
    """
    options = dict(entry.options)
    available = None if columns is None else {*columns} - {"prompt"}
    if ":" not in entry.name:
        reward: Callable[..., Any] = create_builtin(entry.name, _builtin_class(entry.name), options)
        if (
            available is not None
            and isinstance(reward, AnswerReward)
            and reward.column not in available
        ):
            raise _missing_columns_error(entry.name, [reward.column], available)
        if isinstance(reward, ENVIRONMENT_REWARDS):
            code = EnvironmentCode(entry.name, reward.task, {}, tuple(allow_code), folder)
            code.make_module_importable()
            if available is not None and PROBLEM_COLUMN not in available:
                raise _missing_columns_error(entry.name, [PROBLEM_COLUMN], available)
        return reward
    function = load_function(entry.name, allow_code, folder)
    if available is not None:
        duplicates = sorted(available & set(options))
        if duplicates:
            raise ConfigError(
                f"reward {entry.name}: option {duplicates[0]} is also a dataset column, so the "
                "function would get this argument twice",
                fix="rename the option or the column",
            )
        missing = missing_columns(function, available | set(options))
        if missing:
            raise _missing_columns_error(entry.name, missing, available)
    return partial(function, **options) if options else function


def _builtin_class(name: str) -> type[Any]:
    if name in BUILTINS:
        return BUILTINS[name]
    suggestions = did_you_mean.similar_words(name, BUILTINS, cutoff=0.6)
    hint = f"did you mean {suggestions[0]}? " if suggestions else ""
    raise ConfigError(
        f"the reward {name!r} does not exist",
        fix=(
            f"{hint}Use a built-in reward ({', '.join(BUILTINS)}), or your own function as "
            "`module:function`"
        ),
    )


def _missing_columns_error(reward: str, missing: list[str], available: set[str]) -> ConfigError:
    names = ", ".join(sorted(available)) or "none"
    noun = "column" if len(missing) == 1 else "columns"
    fix = "set dataset.answer to the column with the answers"
    return ConfigError(
        f"reward {reward} needs the {noun} {', '.join(missing)}. Columns of the dataset: {names}",
        fix=fix
        if "answer" in missing
        else (f"add the {noun} to the dataset, or give the parameter of the function a default"),
    )
