"""What a reward function gave back, judged: rewards, or the trouble with them in words."""

from __future__ import annotations

import math
import numbers
import traceback
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, NamedTuple

from toolkit.base.units import plural

if TYPE_CHECKING:
    from toolkit.train.rewards.builtin import Score

_LARGEST = 3.4028234e38  # of a float32, which is what the trainer makes of a reward


class Trouble(NamedTuple):
    """What went wrong, in words for a sentence; where, for the saved sample."""

    what: str
    returned: str | None = None
    traceback: str | None = None


class Misbehaved(Exception):
    """A call of a reward that gave no list of rewards."""

    def __init__(self, trouble: Trouble) -> None:
        super().__init__(trouble.what)
        self.trouble = trouble


def checked(returned: Any, size: int) -> list[Score | Trouble]:
    """``size`` rewards, each a finite float, None, or the trouble with it.

    Lists, tuples, arrays and tensors are taken; what is no list of ``size`` raises Misbehaved.
    """
    values = returned.tolist() if hasattr(returned, "tolist") else returned
    if not isinstance(values, list | tuple):
        _close(returned)
        what = f"returned {_article(type(returned).__name__)}, not a list of rewards"
        raise Misbehaved(Trouble(what, _short(returned)))
    if len(values) != size:
        what = f"returned {plural(len(values), 'reward')} for {plural(size, 'completion')}"
        raise Misbehaved(Trouble(what, _short(returned)))
    return [_one(value) for value in values]


def _one(value: Any) -> Score | Trouble:
    if value is None:
        return None
    plain = _item(value)
    if not isinstance(plain, numbers.Real):
        return Trouble(f"returned {_article(type(value).__name__)} for a reward", _short(value))
    try:
        number = float(plain)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or abs(number) > _LARGEST:
        return Trouble(f"returned {_short(plain)}, which is no finite 32-bit number", _short(value))
    return number


def _item(value: Any) -> Any:
    """The number in an array or a tensor of one; anything else as it is."""
    try:
        return value.item() if hasattr(value, "item") else value
    except (TypeError, ValueError, RuntimeError):
        return value


def raised(error: BaseException) -> Trouble:
    last = traceback.extract_tb(error.__traceback__)[-1:]
    at = f" at {last[0].filename}:{last[0].lineno}" if last else ""
    text = "".join(traceback.format_exception(error))
    return Trouble(f"raised {type(error).__name__}: {error}{at}", traceback=text)


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _close(returned: Any) -> None:
    if isinstance(returned, Coroutine):  # it would warn that nobody awaited it
        returned.close()
