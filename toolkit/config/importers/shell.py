"""Split a shell script into commands. A command is a list of words, and each word has a line
number. Nothing is executed.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from toolkit.config.importers.foreign import Computed
from toolkit.config.scalars import read_core

if TYPE_CHECKING:
    from collections.abc import Iterator

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)
_ENDS = "\n;|&()"


@dataclass(slots=True)
class Word:
    """A word of a command. ``unknown`` is the part of the word, such as ``$NAME``, whose value is
    known only when the shell runs. It is empty if there is no such part.
    """

    text: str
    line: int
    unknown: str = ""

    @property
    def value(self) -> Any:
        """The value of the word. This is a scalar of YAML 1.2, or a list or mapping in JSON. If a
        part of the word is unknown, the value is a ``Computed``.
        """
        if self.unknown:
            return Computed(
                self.text or self.unknown,
                f"the value of {self.unknown} is known only when the shell runs",
            )
        return scalar(self.text)


@dataclass(slots=True)
class _Shell:
    text: str
    at: int = 0
    line: int = 1
    variables: dict[str, str] = field(default_factory=dict)

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def take(self) -> str:
        one = self.text[self.at]
        self.at += 1
        self.line += one == "\n"
        return one


def scalar(text: str) -> Any:
    """Return the value that a command line argument stands for: a number, a boolean, None, a
    string, or a list or mapping in JSON.
    """
    if text[:1] in "{[" and text:
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return _flow(text)
    lowered = text.lower()
    if lowered in ("true", "false"):
        return lowered == "true"
    if text in ("None", "null"):
        return None
    return read_core(text) if text else ""


def _flow(text: str) -> Any:
    """Return the list that ``text`` contains in hydra's syntax, such as [console,wandb]. Return any
    other text unchanged.
    """
    if not (text.startswith("[") and text.endswith("]")) or "[" in text[1:]:
        return text
    items = [one.strip().strip("'\"") for one in text[1:-1].split(",")]
    return [scalar(one) for one in items if one]


def commands(text: str) -> Iterator[list[Word]]:
    """Yield each command of a shell script as a list of words. A variable that the script sets to a
    literal value is replaced by that value.
    """
    shell = _Shell(text)
    words: list[Word] = []
    while shell.at < len(text):
        one = shell.peek()
        if one in _ENDS:
            shell.take()
            yield from _end(shell, words)
            words = []
        elif one in " \t\r":
            shell.take()
        elif one == "#":
            _skip_line(shell)
        elif text.startswith(("\\\n", "\\\r\n"), shell.at):
            while shell.take() != "\n":
                pass
        else:
            words.append(_word(shell))
    yield from _end(shell, words)


def _end(shell: _Shell, words: list[Word]) -> Iterator[list[Word]]:
    if words and words[0].text in ("export", "set", "declare", "local"):
        words = words[1:]
    assigned = [_ASSIGNMENT.fullmatch(word.text) for word in words]
    if words and all(assigned):
        for word, found in zip(words, assigned, strict=True):
            assert found is not None
            if not word.unknown:
                shell.variables[found[1]] = found[2]
            else:
                shell.variables.pop(found[1], None)
    elif words:
        yield words


def _skip_line(shell: _Shell) -> None:
    end = shell.text.find("\n", shell.at)
    shell.at = len(shell.text) if end < 0 else end


def _word(shell: _Shell) -> Word:
    word, parts, quote = Word("", shell.line), [], ""
    while shell.at < len(shell.text):
        one = shell.peek()
        if not quote and (one in " \t\r" or one in _ENDS):
            break
        shell.take()
        if quote == "'":
            quote = "" if one == "'" else quote
            if one != "'":
                parts.append(one)
        elif one == "\\" and shell.at < len(shell.text):
            parts.append(_escaped(shell, quote))
        elif one == '"':
            quote = "" if quote else one
        elif one == "'" and not quote:
            quote = one
        elif one in "$`":
            parts.append(_expansion(shell, one, word))
        else:
            parts.append(one)
    word.text = "".join(parts)
    return word


def _escaped(shell: _Shell, quote: str) -> str:
    one = shell.take()
    if one == "\n":
        return ""
    return one if not quote or one in '"\\$`' else f"\\{one}"


def _expansion(shell: _Shell, sign: str, word: Word) -> str:
    """Return the value of ``$NAME``, ``${NAME}``, ``$(...)`` or backquotes. If the value is not
    known, record this in ``word.unknown`` and return the text of the expression.
    """
    if sign == "`":
        return _unknown(shell, word, "`", "`")
    if shell.peek() == "(":
        return _unknown(shell, word, "$(", ")")
    if shell.peek() == "{":
        end = shell.text.find("}", shell.at)
        end = len(shell.text) if end < 0 else end
        name, shell.at = shell.text[shell.at + 1 : end], end + 1
    else:
        found = _NAME.match(shell.text, shell.at)
        name = found[0] if found else shell.peek()
        shell.at += len(name)
    if name in shell.variables:
        return shell.variables[name]
    word.unknown = f"${name}"
    return f"${name}"


def _unknown(shell: _Shell, word: Word, begin: str, end: str) -> str:
    stop = shell.text.find(end, shell.at)
    stop = len(shell.text) - 1 if stop < 0 else stop
    inner = shell.text[shell.at : stop + 1]
    shell.line += inner.count("\n")
    shell.at = stop + 1
    word.unknown = "a command"
    return begin + inner.lstrip("(")


def flags(words: list[Word]) -> Iterator[tuple[str, Any, int]]:
    """Yield ``(name, value, line)`` for each option of a command. The forms are ``--name value``,
    ``--name=value``, ``--name a b`` (the value is a list) and ``--name`` (the value is True).
    Hyphens in names become underscores.
    """
    at = 0
    while at < len(words):
        word = words[at]
        at += 1
        if not word.text.startswith("--") or word.text == "--":
            continue
        name, equals, text = word.text[2:].partition("=")
        values = [Word(text, word.line, word.unknown).value] if equals else []
        while not equals and at < len(words) and not _is_flag(words[at].text):
            values.append(words[at].value)
            at += 1
        value = True if not values else values[0] if len(values) == 1 else values
        computed = next((one for one in values if isinstance(one, Computed)), None)
        yield name.replace("-", "_"), computed or value, word.line


def _is_flag(text: str) -> bool:
    return re.match(r"--?[A-Za-z]", text) is not None or text == "--"
