"""Find tokens and keys, and keep them out of all that is printed or written.

Two nets: what a secret looks like (the published prefixes of the services that people use here),
and what this process knows to be one (the values of environment variables with telling names).
``protect_output`` puts both under stdout, stderr and every log record; what is written to disk
goes through ``redact`` and ``redact_tree``.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO, cast

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

REDACTED = "[redacted]"

# name -> pattern. Group "keep", where there is one, stays: it says what was there.
PATTERNS: dict[str, re.Pattern[str]] = {
    name: re.compile(pattern)
    for name, pattern in {
        "private key": (
            r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
        ),
        "Hugging Face token": r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}\b",
        "API key": r"\bsk-[A-Za-z0-9_-]{16,}",
        "GitHub token": r"\b(?:gh[oprsu]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,})\b",
        "GitLab token": r"\bglpat-[A-Za-z0-9_-]{16,}",
        "AWS key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
        "Google key": r"\bAIza[0-9A-Za-z_-]{35}",
        "NVIDIA key": r"\bnvapi-[A-Za-z0-9_-]{20,}",
        "Weights & Biases key": r"\bwandb_v1_[A-Za-z0-9_]{20,}",
        "Slack token": r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}",
        "JSON web token": r"\beyJ[\w-]{8,2000}\.eyJ[\w-]{8,2000}\.[\w-]{8,}",
        "password in a URL": (
            r"(?P<keep>\b[a-z][a-z0-9+.-]{1,20}://[^\s:/@]{0,200}:)[^\s/@]{1,200}(?=@)"
        ),
        "bearer token": r"(?P<keep>\b[Bb]earer\s+)[A-Za-z0-9._~+/=-]{16,}",
    }.items()
}

# The last words of a key that holds a secret. Plain "token" must stand alone or after a service's
# name: pad_token, eos_token and max_tokens are no secrets.
_SECRET_KEY = re.compile(
    r"^token$|(?:^|[_.\-])(?:api[_-]?key|access[_-]?key(?:[_-]id)?|secret(?:[_-]?key)?"
    r"|private[_-]?key|client[_-]?secret|passw(?:or)?d|passphrase|credentials?|authorization"
    r"|(?:auth|access|api|bearer|refresh|session|hub|hf|wandb|github)[_-]?token)$",
    re.IGNORECASE,
)
_SECRET_VARIABLE = re.compile(
    r"(?:^|_)(?:TOKEN|API_?KEY|ACCESS_?KEY|SECRET|SECRET_?KEY|PRIVATE_?KEY|PASSW(?:OR)?D"
    r"|PASSPHRASE|CREDENTIALS?)$"
)
# Shorter values of a variable ("1", "none", "secret") would blot out ordinary words.
_SHORTEST_VALUE = 8


def is_secret_key(name: str) -> bool:
    """Whether a key of a config, or a variable, is named like one that holds a secret
    (``hub_token``, ``api_key``).
    """
    return bool(_SECRET_KEY.search(name) or _SECRET_VARIABLE.search(name))


def find_secret(text: str) -> str | None:
    """The kind of the first secret that ``text`` shows ("Hugging Face token"), by its form; None
    if it shows none.
    """
    return next((kind for kind, pattern in PATTERNS.items() if pattern.search(text)), None)


def redact(text: str, environ: Mapping[str, str] | None = None) -> str:
    """``text`` with every secret replaced by ``[redacted: what it was]``; ``environ`` defaults to
    this process's.
    """
    for name, value in _known_values(
        frozenset((os.environ if environ is None else environ).items())
    ):
        text = text.replace(value, f"[redacted: {name}]")
    for kind, pattern in PATTERNS.items():
        keep = r"\g<keep>" if "keep" in pattern.groupindex else ""
        text = pattern.sub(f"{keep}[redacted: {kind}]", text)
    return text


def redact_tree(value: Any, environ: Mapping[str, str] | None = None) -> Any:
    """A copy of a tree of mappings, lists and scalars without secrets: by key name, by form and by
    known value.
    """
    if isinstance(value, str):
        return redact(value, environ)
    if isinstance(value, dict):
        return {
            redact(key, environ) if isinstance(key, str) else key: (
                REDACTED
                if isinstance(key, str) and is_secret_key(key) and isinstance(item, str) and item
                else redact_tree(item, environ)
            )
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact_tree(item, environ) for item in value]
    return value


@contextmanager
def protect_output() -> Iterator[None]:
    """While this is open, no secret reaches stdout, stderr or a log record of this process."""
    old_out, old_err, old_factory = sys.stdout, sys.stderr, logging.getLogRecordFactory()

    def make_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = old_factory(*args, **kwargs)
        record.msg, record.args = redact(_message(record)), ()
        if record.exc_info:
            record.exc_text = redact(logging.Formatter().formatException(record.exc_info))
        return record

    sys.stdout = cast("TextIO", _Redacting(old_out))
    sys.stderr = cast("TextIO", _Redacting(old_err))
    logging.setLogRecordFactory(make_record)
    try:
        yield
    finally:
        logging.setLogRecordFactory(old_factory)
        sys.stdout, sys.stderr = old_out, old_err


def protect_process() -> None:
    """``protect_output`` until the process ends."""
    protect_output().__enter__()


class _Redacting:
    """A text stream that passes on what it is given without secrets, ``buffer`` too.

    Everything else is the stream's own.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @property
    def buffer(self) -> _RedactingBytes:
        return _RedactingBytes(self._stream.buffer)

    def write(self, text: str) -> int:
        self._stream.write(redact(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _RedactingBytes:
    """The same for the bytes under a text stream (click writes there in a C locale)."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def write(self, data: bytes) -> int:
        text = bytes(data).decode(errors="surrogateescape")
        self._stream.write(redact(text).encode(errors="surrogateescape"))
        return len(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except (
        TypeError,
        ValueError,
    ):  # a wrong format string is its author's; logging would only print it
        return f"{record.msg} {record.args}"


@lru_cache(maxsize=4)
def _known_values(environ: frozenset[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """(variable, value) of the environment's secrets, longest value first."""
    found = {
        value: name
        for name, value in sorted(environ)
        if _SECRET_VARIABLE.search(name)
        and len(value) >= _SHORTEST_VALUE
        and not value.startswith("/")
    }
    return tuple((found[value], value) for value in sorted(found, key=len, reverse=True))
