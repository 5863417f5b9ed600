"""The options of a built-in reward, checked against its fields."""

from __future__ import annotations

import difflib
from dataclasses import MISSING, fields
from typing import Any

from toolkit.base.errors import ConfigError

# The types that the rewards' fields have, as they are written there -> what a run file may give.
_ACCEPTED: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "str | None": (str, type(None)),
    "bool": (bool,),
    "int": (int,),
    "float": (float, int),
    "float | None": (float, int, type(None)),
    "tuple[str, ...]": (list, tuple),
}


def build(name: str, kind: type[Any], options: dict[str, Any]) -> Any:
    """``kind(**options)``; ConfigError names an unknown, a missing or an ill-typed option."""
    types = {field.name: str(field.type) for field in fields(kind)}
    for option, value in options.items():
        if option not in types:
            near = difflib.get_close_matches(option, types, n=1)
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
