"""Make values from rewards safe before they are written to metrics, completions.jsonl and saved
samples.

A text from a reward may be megabytes long or contain a secret. An object may have a ``__repr__``
that raises.
"""

from __future__ import annotations

import numbers
from typing import TYPE_CHECKING, Any

from toolkit.base.secrets import REDACTED, is_secret_key, redact
from toolkit.train.metric_names import refuse_run_metric
from toolkit.train.rewards.returned import short_repr

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_TEXT_CHARACTERS = 10_000  # the maximum number of characters of a text
MAX_NAME_CHARACTERS = 200  # the maximum number of characters of a name
MAX_DEPTH = 64  # the maximum number of levels of lists and objects in a value of log_extra
MAX_ITEMS = 10_000  # the maximum number of texts and numbers in one saved value
# The number of characters after the limit that are searched for secrets too, because a secret may
# begin before the limit and end after it.
_BEYOND = 4096


def with_safe_log_functions(columns: dict[str, Any]) -> dict[str, Any]:
    """Return ``columns`` with safe functions ``log_metric`` and ``log_extra``. These functions
    remove secrets from texts and limit the length of texts.
    """
    wrapped = dict(columns)
    kinds: tuple[tuple[str, Callable[..., Any], Callable[[str], str]], ...] = (
        ("log_metric", metric_value, metric_name),
        ("log_extra", _texts, str),
    )
    for name, values, named in kinds:
        if name in columns:
            wrapped[name] = _wrapped(columns[name], values, named)
    return wrapped


def shortened(text: str, longest: int = MAX_TEXT_CHARACTERS) -> str:
    """The first ``longest`` characters of ``text``, without secrets and lone surrogates.

    A note with the full length is added to a text that is shortened.
    """
    if len(text) <= longest:
        return _whole(redact(text))
    start = _whole(redact(text[: longest + _BEYOND])[:longest])
    return f"{start}... ({len(text)} characters)"


def _whole(text: str) -> str:
    """``text`` with lone surrogates replaced by their codes, because UTF-8 cannot encode them."""
    return text.encode(errors="backslashreplace").decode()


def to_safe_json(value: Any) -> Any:
    """Convert ``value`` to values that strict JSON allows. Secrets are removed. The length of texts
    and the number of items are limited.
    """
    return _saveable(value, [MAX_ITEMS])


def _saveable(value: Any, left: list[int]) -> Any:
    left[0] -= 1
    if left[0] < 0:
        return "..."
    if value is None or isinstance(value, bool):
        return value
    if type(value) is int or (type(value) is float and value - value == 0):
        return value
    if isinstance(value, str):
        return shortened(value)
    if isinstance(value, dict):
        return {
            shortened(str(key), MAX_NAME_CHARACTERS): REDACTED
            if isinstance(key, str) and is_secret_key(key) and isinstance(item, str) and item
            else _saveable(item, left)
            for key, item in list(value.items())[: max(0, left[0]) + 1]
        }
    if isinstance(value, list | tuple):
        return [_saveable(item, left) for item in value[: max(0, left[0]) + 1]]
    return {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}.get(
        found := short_repr(value), redact(found)
    )


def _wrapped(
    log: Callable[..., Any], values: Callable[[Any], Any], named: Callable[[Any], str]
) -> Callable[[str, Any], None]:
    def call(name: str, value: Any) -> None:
        log(shortened(named(name), MAX_NAME_CHARACTERS), values(value))

    return call


def metric_name(name: Any) -> str:
    """The name of a metric as text. Raises ValueError if the run itself uses the name."""
    text = str(name)
    refuse_run_metric(text)
    return text


def metric_value(value: Any) -> float:
    """The value of a metric as a float. Raises TypeError if the value is not a number, because the
    trainer computes the mean of a metric.
    """
    plain = value.item() if hasattr(value, "item") else value
    if not isinstance(plain, numbers.Real):
        raise TypeError(f"log_metric needs a number, not a {type(plain).__name__}")
    try:
        return float(plain)
    except OverflowError:
        raise TypeError("log_metric needs a number that is in the range of a float") from None


def extra_values(value: Any) -> list[Any] | tuple[Any, ...]:
    """The values that a reward passed to ``log_extra``, as a list or tuple for completions.jsonl.

    Raises TypeError if ``value`` is not a list, tuple, array or tensor. Raises ValueError if an
    item is nested deeper than ``MAX_DEPTH`` levels.
    """
    items = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(items, list | tuple):
        kind = type(value).__name__
        raise TypeError(f"log_extra needs a list with a value for each completion, not a {kind}")
    _refuse_deep(items, MAX_DEPTH)
    return items


def _refuse_deep(value: Any, left: int) -> None:
    if not isinstance(value, dict | list | tuple):
        return
    if left < 0:
        raise ValueError(f"log_extra: a value is nested deeper than {MAX_DEPTH} levels")
    for item in value.values() if isinstance(value, dict) else value:
        _refuse_deep(item, left - 1)


def _texts(value: Any) -> list[Any]:
    """The values that a reward passed to ``log_extra``, with shortened texts. Other values are
    unchanged.
    """
    return [shortened(item) if isinstance(item, str) else item for item in extra_values(value)]
