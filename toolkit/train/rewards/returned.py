"""Check what a reward function returned or raised, and turn it into rewards or descriptions of
errors.

The values are not trusted. Their ``__repr__``, ``__str__``, ``__float__``, ``__len__`` and
``tolist`` are code of the reward and may raise or return megabytes.
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

_LARGEST = 3.4028234e38  # largest float32, because the trainer converts rewards to float32
_LONGEST_MESSAGE = 1000
_LONGEST_NAME = 200
_LONGEST_TRACEBACK = 10_000


class Failure(NamedTuple):
    """The description of an error of a reward.

    ``what`` completes the sentence "reward NAME ...". ``returned`` is the repr of the value that
    the reward returned, if it returned one. ``traceback`` is the text of the traceback, if there is
    one.
    """

    what: str
    returned: str | None = None
    traceback: str | None = None


class UserCodeFailed(Exception):
    """Raised if a call of a reward (or of a tool or an environment) failed as a whole."""

    def __init__(self, trouble: Failure) -> None:
        super().__init__(trouble.what)
        self.trouble = trouble


def check_scores(returned: Any, size: int) -> list[Score | Failure]:
    """Check the value that a reward returned for ``size`` completions.

    The result has one item per completion: a finite float, None, or a Failure for an invalid value.
    ``returned`` may be a list, a tuple, an array or a tensor. Raises UserCodeFailed for any other
    type, or if the length is not ``size``.
    """
    values = _listed(returned)
    if values is None:
        _close(returned)
        what = f"returned {_article(_kind(returned))}, not a list of rewards"
        raise UserCodeFailed(Failure(what, short_repr(returned)))
    if len(values) != size:
        what = f"returned {plural(len(values), 'reward')} for {plural(size, 'completion')}"
        raise UserCodeFailed(Failure(what, short_repr(returned)))
    return [_one(value) for value in values]


def _listed(returned: Any) -> list[Any] | tuple[Any, ...] | None:
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
        what = (
            f"returned {_article(_kind(returned))} whose values cannot be read: "
            f"{describe_exception(error)}"
        )
        raise UserCodeFailed(Failure(what, short_repr(returned))) from error
    # The methods of list and tuple are called directly, because a subclass may override them.
    if isinstance(values, list):
        return list.__getitem__(values, slice(None))
    if isinstance(values, tuple):
        return tuple.__getitem__(values, slice(None))
    return None


def _one(value: Any) -> Score | Failure:
    if value is None:
        return None
    try:
        plain = _item(value)
        if not isinstance(plain, numbers.Real):
            what = f"returned {_article(_kind(value))} as a reward"
            return Failure(what, short_repr(value))
        number = float(plain)
    except OverflowError:
        number = math.inf
    except Exception as error:  # noqa: BLE001 - methods of the value may raise anything
        what = f"returned {_article(_kind(value))} that cannot be read as a number"
        return Failure(f"{what}: {describe_exception(error)}", short_repr(value))
    if not math.isfinite(number) or abs(number) > _LARGEST:
        return Failure(
            (f"returned {short_repr(plain)}, which is not a finite 32-bit number"),
            short_repr(value),
        )
    return number


def _item(value: Any) -> Any:
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
    last = traceback.extract_tb(error.__traceback__)[-1:]
    at = f" at {last[0].filename}:{last[0].lineno}" if last else ""
    try:
        text = "".join(traceback.format_exception(error))
    except Exception:  # noqa: BLE001 - format_exception calls code of the exception
        text = "".join(traceback.format_tb(error.__traceback__))
    if len(text) > _LONGEST_TRACEBACK:
        half = _LONGEST_TRACEBACK // 2
        text = f"{text[:half]}\n...\n{text[-half:]}"
    return Failure(f"raised {describe_exception(error)}{at}", traceback=text)


def describe_exception(error: BaseException) -> str:
    """The class and the text of an exception in one line. Works even if its ``__str__`` raises."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - __str__ is code of the exception
        text = "(its __str__ raises)"
    if len(text) > _LONGEST_MESSAGE:
        text = f"{text[:_LONGEST_MESSAGE]}... ({len(text)} characters)"
    return f"{_kind(error)}: {_line(text)}"


def _kind(value: Any) -> str:
    return _line(str(type.__getattribute__(type(value), "__name__"))[:_LONGEST_NAME])


def _line(text: str) -> str:
    """``text`` in one line and without control characters. It may come from a model."""
    return escape_unprintable(text).replace("\n", "\\n")


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def short_repr(value: Any) -> str:
    """The first 200 characters of a value's ``repr``. Works even if ``repr`` raises."""
    try:
        text = repr(value)
    except Exception as error:  # noqa: BLE001 - __repr__ is code of the value
        return f"<{_kind(value)} whose __repr__ raises {_kind(error)}>"
    return _line(text if len(text) <= 200 else f"{text[:200]}...")


def _close(returned: Any) -> None:
    if isinstance(returned, Coroutine):  # otherwise Python warns that it was never awaited
        returned.close()
