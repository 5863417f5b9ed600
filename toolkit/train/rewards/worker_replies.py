"""Check the replies of the worker process before the run uses them.

The worker process sends its replies through a pipe. The code of a reward, a tool or an environment
runs in the same process, and may write anything to the pipe. Therefore an invalid reply counts as
an error of this code.
"""

from __future__ import annotations

import math
from typing import Any

_ERROR_FIELDS, _FAILURE_FIELDS = 4, 3
_LOAD_REPLIES: tuple[tuple[str, str, type], ...] = (
    ("function", "is_async", bool),
    ("tool", "schema", dict),
    ("episodes", "schema", dict),
)


def is_valid(request: dict[str, Any], reply: dict[str, Any]) -> bool:
    """Whether ``reply`` is a well-formed reply to ``request``. A reply contains one of these: a
    result, a ToolkitError (``error``), an error in the user's code (``misbehaved``), or an invalid
    tool call (``refused``). The scores of a reward are checked later, in ``worker_rewards``.
    """
    if "error" in reply:
        return (
            _is_text_list(reply["error"], 2, _ERROR_FIELDS) and len(reply["error"]) == _ERROR_FIELDS
        )
    if "misbehaved" in reply:
        return is_failure(reply["misbehaved"])
    if "refused" in reply:
        return isinstance(reply["refused"], str)
    request_kind = request["do"]
    if request_kind == "load":
        return any(
            type(reply.get(index_key)) is int and isinstance(reply.get(detail_key), detail_type)
            for index_key, detail_key, detail_type in _LOAD_REPLIES
        )
    if request_kind == "tool":
        return isinstance(reply.get("value"), str)
    if request_kind == "episode":
        return _is_observation(reply)
    if request_kind == "problems":
        rows = reply.get("rows")
        return isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    return isinstance(reply.get("found"), list)


def is_failure(value: object) -> bool:
    """Whether ``value`` is a list of the fields of a ``Failure`` (the description of an error)."""
    return _is_text_list(value, 1, _FAILURE_FIELDS)


def _is_text_list(value: object, min_texts: int, max_items: int) -> bool:
    """Whether ``value`` is a list with ``min_texts`` to ``max_items`` items. The first
    ``min_texts`` items must be texts. Each other item must be a text or None.
    """
    if not isinstance(value, list) or not min_texts <= len(value) <= max_items:
        return False
    return all(isinstance(item, str) for item in value[:min_texts]) and all(
        item is None or isinstance(item, str) for item in value[min_texts:]
    )


def _is_observation(reply: dict[str, Any]) -> bool:
    reward = reply.get("reward")
    return (
        isinstance(reply.get("text"), str)
        and isinstance(reward, (int, float))
        and math.isfinite(reward)
        and isinstance(reply.get("done"), bool)
    )
