"""Send and receive messages between a run and its reward worker process.

A message is a frame: its length, then JSON. JSON is used instead of pickle, so that a worker cannot
run code in the training process. Dataset values that JSON does not support (bytes, dates, decimal
numbers) are sent with a tag for their type. A tuple becomes a list.
"""

from __future__ import annotations

import base64
import datetime
import json
import os
import select
import time
from array import array
from decimal import Decimal
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

HEADER_BYTES = 8
MAX_MESSAGE_BYTES = 1 << 31
_TAG = "\0toolkit"


class TokenIds:
    """Lists of token ids in packed form. JSON lists of token ids would be slow and very long."""

    def __init__(self, lists: Sequence[Sequence[int]]) -> None:
        """Pack ``lists``. Raises TypeError or OverflowError if a value is not a list of token
        ids.
        """
        self.lengths = [len(ids) for ids in lists]
        self.ids = array("q", chain.from_iterable(lists))


_ENCODERS: dict[type, Callable[[Any], Any]] = {
    TokenIds: lambda value: [value.lengths, base64.b64encode(value.ids.tobytes()).decode()],
    bytes: lambda value: base64.b64encode(value).decode(),
    datetime.datetime: lambda value: value.isoformat(),
    datetime.date: lambda value: value.isoformat(),
    datetime.time: lambda value: value.isoformat(),
    datetime.timedelta: lambda value: [value.days, value.seconds, value.microseconds],
    Decimal: str,
}


def _unpack_token_ids(value: Any) -> list[list[int]]:
    packed = array("q")
    packed.frombytes(base64.b64decode(value[1]))
    ends = accumulate(value[0], initial=0)
    return [packed[start:end].tolist() for start, end in pairwise(ends)]


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "bytes": base64.b64decode,
    "datetime": datetime.datetime.fromisoformat,
    "date": datetime.date.fromisoformat,
    "time": datetime.time.fromisoformat,
    "timedelta": lambda value: datetime.timedelta(*value),
    "Decimal": Decimal,
    "TokenIds": _unpack_token_ids,
}


class ChannelError(Exception):
    """Raised if the other process has closed the pipe or sent an invalid message."""


def pack(message: object) -> bytes:
    """Return ``message`` as the bytes of a frame. Raises TypeError or ValueError if a value cannot
    be sent.
    """
    data = json.dumps(message, default=_encode_tagged, separators=(",", ":")).encode()
    return len(data).to_bytes(HEADER_BYTES, "big") + data


def unpack(data: bytes) -> Any:
    """Return the message in the data of a frame. Raises ChannelError if the data is invalid."""
    try:
        return json.loads(data, object_hook=_decode_tagged)
    except (ValueError, RecursionError) as error:
        raise ChannelError(f"the message cannot be read: {error}") from error


def receive(fd: int) -> Any:
    """Read and return the next message from a pipe. None if the pipe was closed. Raises
    ChannelError if the message is invalid.
    """
    header = _read_exactly(fd, HEADER_BYTES)
    if header is None:
        return None
    size = int.from_bytes(header, "big")
    if size > MAX_MESSAGE_BYTES:
        raise ChannelError(f"the message is too long: {size} bytes")
    data = _read_exactly(fd, size)
    if data is None:
        raise ChannelError("the message ends too early")
    return unpack(data)


def send(fd: int, frame: bytes, deadline: float | None = None) -> bool:
    """Write a frame to a non-blocking pipe. Return False if ``deadline`` (monotonic) passed before
    the whole frame was written.

    Raises ChannelError if the other end is closed.
    """
    unsent = memoryview(frame)
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    while unsent:
        try:
            unsent = unsent[os.write(fd, unsent) :]
        except BlockingIOError:
            timeout_ms = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
            if not poll.poll(timeout_ms):
                return False
        except OSError as error:
            raise ChannelError("the other process has closed the pipe") from error
    return True


def _read_exactly(fd: int, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        chunk = os.read(fd, min(size - len(data), 1 << 20))
        if not chunk:
            return None
        data += chunk
    return bytes(data)


def _encode_tagged(value: object) -> Any:
    for value_type, encode in _ENCODERS.items():
        if type(value) is value_type:
            return {_TAG: value_type.__name__, "value": encode(value)}
    raise TypeError(type(value).__name__)


def _decode_tagged(mapping: dict[str, Any]) -> Any:
    decode = _DECODERS.get(mapping[_TAG]) if isinstance(mapping.get(_TAG), str) else None
    if decode is None:
        return mapping
    try:
        return decode(mapping["value"])
    except (LookupError, TypeError, ValueError, ArithmeticError):
        return mapping  # a value of the dataset that looks like a tag but is not one
