"""Check the replies of the worker process before the run uses them.

The worker process sends its replies through a pipe. The code of a reward, a tool or an environment
runs in the same process, and may write anything to the pipe. Therefore an invalid reply counts as
an error of this code.
"""

from __future__ import annotations

import math
from typing import Any

_ERROR_PARTS, _TROUBLE_PARTS = 4, 3
_LOADED: tuple[tuple[str, str, type], ...] = (
    ("function", "is_async", bool),
    ("tool", "schema", dict),
    ("episodes", "schema", dict),
)


def is_valid(request: dict[str, Any], reply: dict[str, Any]) -> bool:
    """Whether ``reply`` is a well-formed reply to ``request``. A reply contains one of these: a
    result, a ToolkitError (``error``), an error in the user's code (``misbehaved``), or an invalid
    tool call (``refused``). The scores of a reward are checked later, in ``remote``.
    """
    if "error" in reply:
        return _texts(reply["error"], 2, _ERROR_PARTS) and len(reply["error"]) == _ERROR_PARTS
    if "misbehaved" in reply:
        return is_failure(reply["misbehaved"])
    if "refused" in reply:
        return isinstance(reply["refused"], str)
    kind = request["do"]
    if kind == "load":
        return any(
            type(reply.get(number)) is int and isinstance(reply.get(more), form)
            for number, more, form in _LOADED
        )
    if kind == "tool":
        return isinstance(reply.get("value"), str)
    if kind == "episode":
        return _is_observation(reply)
    if kind == "problems":
        rows = reply.get("rows")
        return isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    return isinstance(reply.get("found"), list)


def is_failure(value: Any) -> bool:
    """Whether ``value`` is a list of the fields of a ``Failure`` (the description of an error)."""
    return _texts(value, 1, _TROUBLE_PARTS)


def _texts(value: Any, needed: int, most: int) -> bool:
    """Whether ``value`` is a list with ``needed`` to ``most`` items. The first ``needed`` items
    must be texts. Each other item must be a text or None.
    """
    if not isinstance(value, list) or not needed <= len(value) <= most:
        return False
    return all(isinstance(one, str) for one in value[:needed]) and all(
        one is None or isinstance(one, str) for one in value[needed:]
    )


def _is_observation(reply: dict[str, Any]) -> bool:
    reward = reply.get("reward")
    return (
        isinstance(reply.get("text"), str)
        and isinstance(reward, (int, float))
        and math.isfinite(reward)
        and isinstance(reply.get("done"), bool)
    )
