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
from toolkit.train.rewards.score_checks import short_repr

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_TEXT_CHARACTERS = 10_000  # the maximum number of characters of a text
MAX_NAME_CHARACTERS = 200  # the maximum number of characters of a name
MAX_DEPTH = 64  # the maximum number of levels of lists and objects in a value of log_extra
MAX_ITEMS = 10_000  # the maximum number of texts and numbers in one saved value
# The number of characters after the limit that are searched for secrets too, because a secret may
# begin before the limit and end after it.
_SECRET_OVERLAP = 4096


def with_safe_log_functions(columns: dict[str, Any]) -> dict[str, Any]:
    """Return ``columns`` with safe functions ``log_metric`` and ``log_extra``. These functions
    remove secrets from texts and limit the length of texts.
    """
    safe_columns = dict(columns)
    conversions: tuple[tuple[str, Callable[..., Any], Callable[[str], str]], ...] = (
        ("log_metric", metric_value, metric_name),
        ("log_extra", _shorten_texts, str),
    )
    for name, convert_values, convert_name in conversions:
        if name in columns:
            safe_columns[name] = _safe_log_function(columns[name], convert_values, convert_name)
    return safe_columns


def safe_text(text: str, max_characters: int = MAX_TEXT_CHARACTERS) -> str:
    """The first ``max_characters`` characters of ``text``, without secrets and lone surrogates.

    A note with the full length is added to a text that is shortened.
    """
    if len(text) <= max_characters:
        return _escape_surrogates(redact(text))
    start = _escape_surrogates(redact(text[: max_characters + _SECRET_OVERLAP])[:max_characters])
    return f"{start}... ({len(text)} characters)"


def _escape_surrogates(text: str) -> str:
    """``text`` with lone surrogates replaced by their codes, because UTF-8 cannot encode them."""
    return text.encode(errors="backslashreplace").decode()


def to_safe_json(value: object) -> Any:
    """Convert ``value`` to values that strict JSON allows. Secrets are removed. The length of texts
    and the number of items are limited.
    """
    return _saveable(value, [MAX_ITEMS])


def _saveable(value: object, remaining_items: list[int]) -> Any:
    remaining_items[0] -= 1
    if remaining_items[0] < 0:
        return "..."
    if value is None or isinstance(value, bool):
        return value
    if type(value) is int or (type(value) is float and value - value == 0):
        return value
    if isinstance(value, str):
        return safe_text(value)
    if isinstance(value, dict):
        return {
            safe_text(str(key), MAX_NAME_CHARACTERS): REDACTED
            if isinstance(key, str) and is_secret_key(key) and isinstance(item, str) and item
            else _saveable(item, remaining_items)
            for key, item in list(value.items())[: max(0, remaining_items[0]) + 1]
        }
    if isinstance(value, list | tuple):
        return [
            _saveable(item, remaining_items) for item in value[: max(0, remaining_items[0]) + 1]
        ]
    return {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}.get(
        shown := short_repr(value), redact(shown)
    )


def _safe_log_function(
    log: Callable[..., Any],
    convert_values: Callable[[Any], Any],
    convert_name: Callable[[Any], str],
) -> Callable[[str, Any], None]:
    def log_safely(name: str, value: object) -> None:
        log(safe_text(convert_name(name), MAX_NAME_CHARACTERS), convert_values(value))

    return log_safely


def metric_name(name: Any) -> str:
    """The name of a metric as text. Raises ValueError if the run itself uses the name."""
    text = str(name)
    refuse_run_metric(text)
    return text


def metric_value(value: object) -> float:
    """The value of a metric as a float. Raises TypeError if the value is not a number, because the
    trainer computes the mean of a metric.
    """
    scalar = value.item() if hasattr(value, "item") else value
    if not isinstance(scalar, numbers.Real):
        raise TypeError(f"log_metric needs a number, not a {type(scalar).__name__}")
    try:
        return float(scalar)
    except OverflowError:
        raise TypeError("log_metric needs a number that is in the range of a float") from None


def extra_values(value: object) -> list[Any] | tuple[Any, ...]:
    """The values that a reward passed to ``log_extra``, as a list or tuple for completions.jsonl.

    Raises TypeError if ``value`` is not a list, tuple, array or tensor. Raises ValueError if an
    item is nested deeper than ``MAX_DEPTH`` levels.
    """
    items = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(items, list | tuple):
        type_name = type(value).__name__
        raise TypeError(
            f"log_extra needs a list with a value for each completion, not a {type_name}"
        )
    _check_depth(items, MAX_DEPTH)
    return items


def _check_depth(value: object, levels: int) -> None:
    if not isinstance(value, dict | list | tuple):
        return
    if levels < 0:
        raise ValueError(f"log_extra: a value is nested deeper than {MAX_DEPTH} levels")
    for item in value.values() if isinstance(value, dict) else value:
        _check_depth(item, levels - 1)


def _shorten_texts(value: object) -> list[Any]:
    """The values that a reward passed to ``log_extra``, with shortened texts. Other values are
    unchanged.
    """
    return [safe_text(item) if isinstance(item, str) else item for item in extra_values(value)]
