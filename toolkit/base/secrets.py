"""Find tokens and keys, and remove them from everything that is printed or written.

A secret is recognised in two ways. The first is its pattern, because the tokens of common services
have published prefixes. The second is its value: the value of an environment variable is a secret
if the variable's name suggests this. ``protect_output`` uses both ways for stdout, stderr and every
log record. Text for files is passed through ``redact`` or ``redact_tree`` before it is written.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from functools import lru_cache
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO, cast
from urllib.parse import quote, quote_plus, unquote

from toolkit.base.formatting import escape_unprintable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

REDACTED = "[redacted]"
_STREAMS = ("stdout", "stderr", "__stdout__", "__stderr__")

# Maps the kind of a secret to its pattern. The text of a group "keep" stays, to show what was
# redacted.
PATTERNS: dict[str, re.Pattern[str]] = {
    name: re.compile(pattern)
    for name, pattern in {
        "private key": (
            r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
        ),
        "Hugging Face token": r"(?<![A-Za-z0-9])(?:hf|api_org)_[A-Za-z0-9]{16,}\b",
        "API key": r"\bsk-[A-Za-z0-9_-]{16,}",
        "GitHub token": (
            r"(?<![A-Za-z0-9])(?:gh[oprsu]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,})\b"
        ),
        "GitLab token": r"(?<![A-Za-z0-9])glpat-[A-Za-z0-9_-]{16,}",
        "AWS key": r"(?<![A-Za-z0-9])(?:AKIA|ASIA)[0-9A-Z]{16}\b",
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

# Matches keys whose last words name a secret. "token" alone is a secret, and so is "token" after
# the name of a service; pad_token, eos_token and max_tokens are not secrets.
_SECRET_KEY = re.compile(
    r"^token$|(?:^|[_.\-])(?:api[_-]?key|access[_-]?key(?:[_-]id)?|secret(?:[_-]?key)?"
    r"|private[_-]?key|client[_-]?secret|passw(?:or)?d|passphrase|credentials?|authorization"
    r"|(?:auth|access|api|bearer|refresh|session|hub|hf|wandb|github)[_-]?token)$",
    re.IGNORECASE,
)
_SECRET_VARIABLE = re.compile(
    r"(?:^|_)(?:TOKEN|API_?KEY|SECRET|CREDENTIALS?|PASSPHRASE|PASS|AUTH|AUTHORIZATION|DSN|JWT|PAT"
    r"|COOKIE|CONNECTION_STRING|ACCESS_?KEY_ID|KEY_BASE64|WEBHOOK_URL|DOCKER_AUTH_CONFIG)$"
    r"|(?:_KEY|_PWD|APIKEY|PASSW(?:OR)?D)$"
)
# Finds a password in a variable that contains a URL, such as DATABASE_URL or http_proxy.
_USER_INFO = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s/@:]*:([^\s/]+)@")
# The shortest value of a variable that is redacted. Shorter values ("1", "none", "secret") are
# ordinary words, which must stay readable.
_MIN_SECRET_CHARACTERS = 8


def is_secret_key(name: str) -> bool:
    """Whether the name of a key or variable suggests a secret (``hub_token``, ``api_key``)."""
    return bool(_SECRET_KEY.search(name) or _SECRET_VARIABLE.search(name))


def find_secret(text: str) -> str | None:
    """Return the kind of the first secret in ``text``, such as "Hugging Face token"; None if there
    is none. Secrets are recognised only by their pattern.
    """
    return next((kind for kind, pattern in PATTERNS.items() if pattern.search(text)), None)


def redact(text: str, environ: Mapping[str, str] | None = None) -> str:
    """Return ``text`` with every secret replaced by ``[redacted: kind]``. A secret is recognised by
    its pattern, or because it is the value of a secret variable in ``environ``. If ``environ`` is
    None, the environment of this process is used.
    """
    secrets = _secrets_of_process() if environ is None else _secrets_in(frozenset(environ.items()))
    for name, value in secrets:
        text = text.replace(value, f"[redacted: {name}]")
    for kind, pattern in PATTERNS.items():
        keep = r"\g<keep>" if "keep" in pattern.groupindex else ""
        text = pattern.sub(f"{keep}[redacted: {kind}]", text)
    return text


def redact_tree(value: object, environ: Mapping[str, str] | None = None) -> Any:
    """Return a copy of a tree of mappings, lists and scalars without secrets. A secret is
    recognised by the name of its key, by its pattern, or because it is the value of a secret
    environment variable.
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


def protect_output() -> Callable[[], None]:
    """Remove secrets from everything that this process writes to stdout, stderr and log records
    from now on, also in threads and exit handlers.

    Return a function that removes this protection. Code that writes directly to the file
    descriptors is not covered.
    """
    streams = {name: getattr(sys, name) for name in _STREAMS}
    old_factory = logging.getLogRecordFactory()

    def make_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = old_factory(*args, **kwargs)
        record.msg, record.args = redact(_message_of(record)), ()
        if record.exc_info:
            record.exc_text = redact(logging.Formatter().formatException(record.exc_info))
        return record

    def undo() -> None:
        logging.setLogRecordFactory(old_factory)
        for name, stream in streams.items():
            setattr(sys, name, stream)

    for name, stream in streams.items():
        if stream is not None:
            setattr(sys, name, cast("TextIO", _RedactingStream(stream)))
    logging.setLogRecordFactory(make_record)
    return undo


class _RedactingStream:
    """A text stream that removes secrets from what is written to it and to its ``buffer``.

    All other attributes are those of the stream.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @property
    def buffer(self) -> _RedactingBuffer:
        return _RedactingBuffer(self._stream.buffer)

    def write(self, text: str) -> int:
        self._stream.write(redact(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _RedactingBuffer:
    """A binary stream that removes secrets from what is written to it. It replaces the ``buffer``
    of a text stream, because click writes to this buffer in a C locale.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def write(self, data: bytes) -> int:
        text = bytes(data).decode(errors="surrogateescape")
        self._stream.write(redact(text).encode(errors="surrogateescape"))
        return len(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _message_of(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # noqa: BLE001 - a wrong format string, or an argument whose __str__ raises
        try:
            return f"{record.msg} {record.args}"
        except Exception:  # noqa: BLE001 - an error in the argument's own code
            return f"{type(record.msg).__name__} that cannot be displayed"


# Maps every secret that this process's environment has had so far to the name of its variable.
_variable_of_secret: dict[str, str] = {}
_sorted_secrets: tuple[frozenset[tuple[str, str]], tuple[tuple[str, str], ...]] = (frozenset(), ())


def _secrets_of_process() -> tuple[tuple[str, str], ...]:
    """Return the values of all secret environment variables that this process has had so far.
    Variables that were removed from the environment later are included.
    """
    global _sorted_secrets
    environ = frozenset(os.environ.items())
    if environ != _sorted_secrets[0]:
        _variable_of_secret.update({value: name for name, value in _secrets_in(environ)})
        longest_first = sorted(_variable_of_secret, key=len, reverse=True)
        _sorted_secrets = (
            environ,
            tuple((_variable_of_secret[value], value) for value in longest_first),
        )
    return _sorted_secrets[1]


@lru_cache(maxsize=4)
def _secrets_in(environ: frozenset[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Return (variable, value) for each secret in the environment, the longest value first. Every
    encoding of a secret that ``_encodings`` returns has its own pair.
    """
    variable_of_secret: dict[str, str] = {}
    for name, value in sorted(environ):
        secrets = [match.group(1) for match in _USER_INFO.finditer(value)]
        if _SECRET_VARIABLE.search(name.upper()) and not _is_path(value):
            secrets += [value, value.strip(), *value.splitlines()]
        for secret in secrets:
            variable_of_secret |= dict.fromkeys(_encodings(secret), name)
    return tuple(
        (variable_of_secret[value], value)
        for value in sorted(variable_of_secret, key=len, reverse=True)
    )


def _is_path(value: str) -> bool:
    """Whether ``value`` is a path to a secret (``/run/secrets/token``) instead of a secret. A
    base64 secret can begin with "/" too, so ``value`` counts as a path only if the file or its
    folder exists.
    """
    if not value.startswith("/") or "\0" in value:
        return False
    try:
        return os.path.exists(value) or (
            value.count("/") > 1 and os.path.isdir(_parent_folder(value))
        )
    except OSError:
        return False


def _parent_folder(value: str) -> str:
    return value.rpartition("/")[0]


def _encodings(secret: str) -> list[str]:
    """Return the texts as which ``secret`` may appear in output.

    - the secret itself
    - the secret after ``repr``, ``ascii`` or JSON encoding, once or twice
    - the ``repr`` of the secret as bytes
    - the secret after URL encoding or URL decoding
    - the secret after ``escape_unprintable``
    """
    once = _quoted_forms(secret)
    forms = [
        secret,
        *once,
        *(twice for form in once for twice in _quoted_forms(form)),
        repr(secret.encode(errors="surrogateescape"))[2:-1],
        quote(secret, safe="", errors="surrogateescape"),
        quote(secret, errors="surrogateescape"),
        quote_plus(secret, errors="surrogateescape"),
        unquote(secret),
        escape_unprintable(secret),
        escape_unprintable(secret).replace("\n", "\\n"),
    ]
    return [form for form in dict.fromkeys(forms) if len(form) >= _MIN_SECRET_CHARACTERS]


def _quoted_forms(text: str) -> list[str]:
    forms = [json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]]
    for quote_function in (repr, ascii):
        forms += [
            quote_function(text)[1:-1],
            # ``repr`` of a text with both quote characters escapes the single quotes
            quote_function(f"{text}'\"")[1:-4],
            quote_function(f"{text}'")[1:-2],  # with only single quotes, nothing is escaped
        ]
    return forms
