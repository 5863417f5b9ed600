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
from toolkit.train.rewards.user import load_function, missing_columns
from toolkit.train.rewards.verifiers_tasks import Verifiers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from toolkit.config.run_config import RewardFunction

# Maps the annotated type of an option to the types of its value in a run file.
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


def create_builtin(name: str, kind: type[Any], options: dict[str, Any]) -> Any:
    """Create the built-in reward ``name``, which is the class ``kind``, with ``options``.

    Raises ConfigError for an unknown option, a missing option or a value of the wrong type.
    """
    types = {field.name: str(field.type) for field in fields(kind)}
    for option, value in options.items():
        if option not in types:
            near = did_you_mean.similar_words(option, types, cutoff=0.6)
            raise ConfigError(
                f"reward {name} has no option {option!r}",
                fix=f"did you mean {near[0]}?" if near else f"its options are: {', '.join(types)}",
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
        Verifiers,
        OpenEnv,
    )
}
ENVIRONMENT_REWARDS = (ReasoningGym, Verifiers, OpenEnv)
"""The rewards that score the problems of an environment."""


def make_function(
    wanted: RewardFunction,
    allow_code: Sequence[str],
    folder: Path,
    columns: Sequence[str] | None,
) -> Callable[..., Any]:
    """Return the reward function for ``wanted``, an entry of the run file.

    ``folder`` is the folder of the run file. ``columns`` are the columns of the dataset, or None if
    they are not known yet. Raises ConfigError, or MissingExtraError if math_verify's package is not
    installed.
    """
    options = dict(wanted.options)
    there = None if columns is None else {*columns} - {"prompt"}
    if ":" not in wanted.name:
        reward: Callable[..., Any] = create_builtin(wanted.name, _kind(wanted.name), options)
        if there is not None and isinstance(reward, AnswerReward) and reward.column not in there:
            raise _no_column(wanted.name, [reward.column], there)
        if isinstance(reward, ENVIRONMENT_REWARDS):
            EnvironmentCode(wanted.name, reward.task, {}, tuple(allow_code), folder).prepare()
            if there is not None and PROBLEM_COLUMN not in there:
                raise _no_column(wanted.name, [PROBLEM_COLUMN], there)
        return reward
    function = load_function(wanted.name, allow_code, folder)
    if there is not None:
        both = sorted(there & set(options))
        if both:
            raise ConfigError(
                f"reward {wanted.name}: option {both[0]} is also a dataset column, so the function "
                "would get this argument twice",
                fix="rename the option or the column",
            )
        missing = missing_columns(function, there | set(options))
        if missing:
            raise _no_column(wanted.name, missing, there)
    return partial(function, **options) if options else function


def _kind(name: str) -> type[Any]:
    if name in BUILTINS:
        return BUILTINS[name]
    near = did_you_mean.similar_words(name, BUILTINS, cutoff=0.6)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(
        f"the reward {name!r} does not exist",
        fix=(
            f"{hint}Use a built-in reward ({', '.join(BUILTINS)}), or your own function as "
            "`module:function`"
        ),
    )


def _no_column(reward: str, missing: list[str], there: set[str]) -> ConfigError:
    names = ", ".join(sorted(there)) or "none"
    word = "column" if len(missing) == 1 else "columns"
    fix = "set dataset.answer to the column with the answers"
    return ConfigError(
        f"reward {reward} needs the {word} {', '.join(missing)}. Columns of the dataset: {names}",
        fix=fix
        if "answer" in missing
        else (f"add the {word} to the dataset, or give the parameter of the function a default"),
    )
