"""Check what a reward function returned or raised, and turn it into rewards or descriptions of
errors.

The values are not trusted. Their ``__repr__``, ``__str__``, ``__float__``, ``__len__`` and
``tolist`` are code of the reward. These methods may raise exceptions, or return megabytes.
"""

from __future__ import annotations

import math
import numbers
import traceback
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, NamedTuple

from toolkit.base.formatting import escape_unprintable, plural

if TYPE_CHECKING:
    from toolkit.train.rewards.builtin import Score

_MAX_FLOAT32 = 3.4028234e38  # largest float32, because the trainer converts rewards to float32
_MAX_MESSAGE_CHARACTERS = 1000
_MAX_NAME_CHARACTERS = 200
_MAX_TRACEBACK_CHARACTERS = 10_000


class Failure(NamedTuple):
    """The description of an error of a reward.

    ``description`` completes the sentence "reward NAME ...". ``returned`` is the repr of the value
    that the reward returned, if it returned one. ``traceback`` is the text of the traceback, if
    there is one.
    """

    description: str
    returned: str | None = None
    traceback: str | None = None


class UserCodeFailed(Exception):
    """Raised if a call of a reward (or of a tool or an environment) failed as a whole."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.description)
        self.failure = failure


def check_scores(returned: object, size: int) -> list[Score | Failure]:
    """Check the value that a reward returned for ``size`` completions.

    The result has one item per completion: a finite float, None, or a Failure for an invalid value.
    ``returned`` may be a list, a tuple, an array or a tensor. Raises UserCodeFailed for any other
    type, or if the length is not ``size``.
    """
    values = _items_of(returned)
    if values is None:
        _close_coroutine(returned)
        description = f"returned {_with_article(_type_name(returned))}, not a list of rewards"
        raise UserCodeFailed(Failure(description, short_repr(returned)))
    if len(values) != size:
        description = f"returned {plural(len(values), 'reward')} for {plural(size, 'completion')}"
        raise UserCodeFailed(Failure(description, short_repr(returned)))
    return [_check_score(value) for value in values]


def _items_of(returned: Any) -> list[Any] | tuple[Any, ...] | None:
    """The items of a list, tuple, array or tensor. None for any other type."""
    values = returned
    try:
        if getattr(returned, "is_sparse", False) is True or "sparse" in str(
            getattr(returned, "layout", "")
        ):
            values = returned.to_dense()
        if hasattr(values, "tolist"):
            values = values.tolist()
    except Exception as error:
        description = (
            f"returned {_with_article(_type_name(returned))} whose values cannot be read: "
            f"{exception_summary(error)}"
        )
        raise UserCodeFailed(Failure(description, short_repr(returned))) from error
    # The methods of list and tuple are called directly, because a subclass may override them.
    if isinstance(values, list):
        return list.__getitem__(values, slice(None))
    if isinstance(values, tuple):
        return tuple.__getitem__(values, slice(None))
    return None


def _check_score(value: object) -> Score | Failure:
    if value is None:
        return None
    try:
        scalar = _unwrap_scalar(value)
        if not isinstance(scalar, numbers.Real):
            description = f"returned {_with_article(_type_name(value))} as a reward"
            return Failure(description, short_repr(value))
        number = float(scalar)
    except OverflowError:
        number = math.inf
    except Exception as error:  # noqa: BLE001 - methods of the value may raise anything
        description = f"returned {_with_article(_type_name(value))} that cannot be read as a number"
        return Failure(f"{description}: {exception_summary(error)}", short_repr(value))
    if not math.isfinite(number) or abs(number) > _MAX_FLOAT32:
        return Failure(
            (f"returned {short_repr(scalar)}, which is not a finite 32-bit number"),
            short_repr(value),
        )
    return number


def _unwrap_scalar(value: object) -> Any:
    """Return the number in ``value`` if it is an array or tensor with one item. Otherwise, return
    ``value`` unchanged.
    """
    try:
        return value.item() if hasattr(value, "item") else value
    except (TypeError, ValueError, RuntimeError):
        return value


def failure_from(error: BaseException) -> Failure:
    """Return the Failure for a call that raised ``error``. It contains the last location of the
    traceback of ``error``.
    """
    last_frame = traceback.extract_tb(error.__traceback__)[-1:]
    location = f" at {last_frame[0].filename}:{last_frame[0].lineno}" if last_frame else ""
    try:
        text = "".join(traceback.format_exception(error))
    except Exception:  # noqa: BLE001 - format_exception calls code of the exception
        text = "".join(traceback.format_tb(error.__traceback__))
    if len(text) > _MAX_TRACEBACK_CHARACTERS:
        half = _MAX_TRACEBACK_CHARACTERS // 2
        text = f"{text[:half]}\n...\n{text[-half:]}"
    return Failure(f"raised {exception_summary(error)}{location}", traceback=text)


def exception_summary(error: BaseException) -> str:
    """The class and the text of an exception in one line. Works even if its ``__str__`` raises."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - __str__ is code of the exception
        text = "(its __str__ raises)"
    if len(text) > _MAX_MESSAGE_CHARACTERS:
        text = f"{text[:_MAX_MESSAGE_CHARACTERS]}... ({len(text)} characters)"
    return f"{_type_name(error)}: {_one_line(text)}"


def _type_name(value: object) -> str:
    return _one_line(str(type.__getattribute__(type(value), "__name__"))[:_MAX_NAME_CHARACTERS])


def _one_line(text: str) -> str:
    """``text`` in one line and without control characters. It may come from a model."""
    return escape_unprintable(text).replace("\n", "\\n")


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def short_repr(value: object) -> str:
    """The first 200 characters of a value's ``repr``. Works even if ``repr`` raises."""
    try:
        text = repr(value)
    except Exception as error:  # noqa: BLE001 - __repr__ is code of the value
        return f"<{_type_name(value)} whose __repr__ raises {_type_name(error)}>"
    return _one_line(text if len(text) <= 200 else f"{text[:200]}...")


def _close_coroutine(returned: object) -> None:
    if isinstance(returned, Coroutine):  # otherwise Python warns that it was never awaited
        returned.close()
