"""What a reward function returned or raised, judged: rewards, or the trouble with them in words.

Nothing of what is judged is trusted: its ``__repr__``, ``__str__``, ``__float__``, ``__len__`` and
``tolist`` are the reward's own code and may raise, or give megabytes.
"""

from __future__ import annotations

import math
import numbers
import traceback
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, NamedTuple

from toolkit.base.formatting import plural, visible

if TYPE_CHECKING:
    from toolkit.train.rewards.builtin import Score

_LARGEST = 3.4028234e38  # of a float32, which is what the trainer makes of a reward
_LONGEST_MESSAGE = 1000
_LONGEST_NAME = 200
_LONGEST_TRACEBACK = 10_000


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
    values = _listed(returned)
    if values is None:
        _close(returned)
        what = f"returned {_article(_kind(returned))}, not a list of rewards"
        raise Misbehaved(Trouble(what, short(returned)))
    if len(values) != size:
        what = f"returned {plural(len(values), 'reward')} for {plural(size, 'completion')}"
        raise Misbehaved(Trouble(what, short(returned)))
    return [_one(value) for value in values]


def _listed(returned: Any) -> list[Any] | tuple[Any, ...] | None:
    """The items of a list, tuple, array or tensor; None for what is none of them."""
    values = returned
    try:
        if getattr(returned, "is_sparse", False) is True or "sparse" in str(
            getattr(returned, "layout", "")
        ):
            values = returned.to_dense()
        if hasattr(values, "tolist"):
            values = values.tolist()
    except Exception as error:
        what = f"returned {_article(_kind(returned))} whose values cannot be read: {message(error)}"
        raise Misbehaved(Trouble(what, short(returned))) from error
    # By the built-in classes' own methods: a subclass may have changed them.
    if isinstance(values, list):
        return list.__getitem__(values, slice(None))
    if isinstance(values, tuple):
        return tuple.__getitem__(values, slice(None))
    return None


def _one(value: Any) -> Score | Trouble:
    if value is None:
        return None
    try:
        plain = _item(value)
        if not isinstance(plain, numbers.Real):
            what = f"returned {_article(_kind(value))} for a reward"
            return Trouble(what, short(value))
        number = float(plain)
    except OverflowError:
        number = math.inf
    except Exception as error:  # noqa: BLE001 - its own methods raise what they like
        what = f"returned {_article(_kind(value))} that cannot be read as a number"
        return Trouble(f"{what}: {message(error)}", short(value))
    if not math.isfinite(number) or abs(number) > _LARGEST:
        return Trouble(f"returned {short(plain)}, which is no finite 32-bit number", short(value))
    return number


def _item(value: Any) -> Any:
    """The number in an array or a tensor of one; anything else as it is."""
    try:
        return value.item() if hasattr(value, "item") else value
    except (TypeError, ValueError, RuntimeError):
        return value


def raised(error: BaseException) -> Trouble:
    """The trouble with a call that raised ``error``, with the last place in its traceback."""
    last = traceback.extract_tb(error.__traceback__)[-1:]
    at = f" at {last[0].filename}:{last[0].lineno}" if last else ""
    try:
        text = "".join(traceback.format_exception(error))
    except Exception:  # noqa: BLE001 - what it calls is the exception's own code
        text = "".join(traceback.format_tb(error.__traceback__))
    if len(text) > _LONGEST_TRACEBACK:
        half = _LONGEST_TRACEBACK // 2
        text = f"{text[:half]}\n...\n{text[-half:]}"
    return Trouble(f"raised {message(error)}{at}", traceback=text)


def message(error: BaseException) -> str:
    """An exception's class and text in one line, whatever its ``__str__`` does."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - the exception's own code
        text = "(its __str__ raises)"
    if len(text) > _LONGEST_MESSAGE:
        text = f"{text[:_LONGEST_MESSAGE]}... ({len(text)} characters)"
    return f"{_kind(error)}: {_line(text)}"


def _kind(value: Any) -> str:
    return _line(str(type.__getattribute__(type(value), "__name__"))[:_LONGEST_NAME])


def _line(text: str) -> str:
    """``text`` in one line, with nothing that a terminal would obey: it may hold a completion."""
    return visible(text).replace("\n", "\\n")


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def short(value: Any) -> str:
    """At most 200 characters of a value's ``repr``, whatever that does."""
    try:
        text = repr(value)
    except Exception as error:  # noqa: BLE001 - the value's own code
        return f"<{_kind(value)} whose __repr__ raises {_kind(error)}>"
    return _line(text if len(text) <= 200 else f"{text[:200]}...")


def _close(returned: Any) -> None:
    if isinstance(returned, Coroutine):  # it would warn that nobody awaited it
        returned.close()
