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
_COMMAND_ENDS = "\n;|&()"


@dataclass(slots=True)
class Word:
    """A word of a command. ``unknown_part`` is the part of the word, such as ``$NAME``, whose value
    is known only when the shell runs. It is empty if there is no such part.
    """

    text: str
    line: int
    unknown_part: str = ""

    @property
    def value(self) -> Any:
        """The value of the word. This is a scalar of YAML 1.2, or a list or mapping in JSON. If a
        part of the word is unknown, the value is a ``Computed``.
        """
        if self.unknown_part:
            return Computed(
                self.text or self.unknown_part,
                f"the value of {self.unknown_part} is known only when the shell runs",
            )
        return argument_value(self.text)


@dataclass(slots=True)
class _ShellReader:
    text: str
    offset: int = 0
    line: int = 1
    variables: dict[str, str] = field(default_factory=dict)

    def peek(self) -> str:
        return self.text[self.offset : self.offset + 1]

    def next_character(self) -> str:
        character = self.text[self.offset]
        self.offset += 1
        self.line += character == "\n"
        return character


def argument_value(text: str) -> Any:
    """Return the value that a command line argument stands for: a number, a boolean, None, a
    string, or a list or mapping in JSON.
    """
    if text[:1] in "{[" and text:
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return _hydra_list(text)
    lowered = text.lower()
    if lowered in ("true", "false"):
        return lowered == "true"
    if text in ("None", "null"):
        return None
    return read_core(text) if text else ""


def _hydra_list(text: str) -> Any:
    """Return the list that ``text`` contains in hydra's syntax, such as [console,wandb]. Return any
    other text unchanged.
    """
    if not (text.startswith("[") and text.endswith("]")) or "[" in text[1:]:
        return text
    items = [one.strip().strip("'\"") for one in text[1:-1].split(",")]
    return [argument_value(one) for one in items if one]


def split_commands(text: str) -> Iterator[list[Word]]:
    """Yield each command of a shell script as a list of words. A variable that the script sets to a
    literal value is replaced by that value.
    """
    shell = _ShellReader(text)
    words: list[Word] = []
    while shell.offset < len(text):
        character = shell.peek()
        if character in _COMMAND_ENDS:
            shell.next_character()
            yield from _end_command(shell, words)
            words = []
        elif character in " \t\r":
            shell.next_character()
        elif character == "#":
            _skip_line(shell)
        elif text.startswith(("\\\n", "\\\r\n"), shell.offset):
            while shell.next_character() != "\n":
                pass
        else:
            words.append(_read_word(shell))
    yield from _end_command(shell, words)


def _end_command(shell: _ShellReader, words: list[Word]) -> Iterator[list[Word]]:
    if words and words[0].text in ("export", "set", "declare", "local"):
        words = words[1:]
    assignments = [_ASSIGNMENT.fullmatch(word.text) for word in words]
    if words and all(assignments):
        for word, assignment in zip(words, assignments, strict=True):
            assert assignment is not None
            if not word.unknown_part:
                shell.variables[assignment[1]] = assignment[2]
            else:
                shell.variables.pop(assignment[1], None)
    elif words:
        yield words


def _skip_line(shell: _ShellReader) -> None:
    end = shell.text.find("\n", shell.offset)
    shell.offset = len(shell.text) if end < 0 else end


def _read_word(shell: _ShellReader) -> Word:
    word, parts, quote = Word("", shell.line), [], ""
    while shell.offset < len(shell.text):
        character = shell.peek()
        if not quote and (character in " \t\r" or character in _COMMAND_ENDS):
            break
        shell.next_character()
        if quote == "'":
            quote = "" if character == "'" else quote
            if character != "'":
                parts.append(character)
        elif character == "\\" and shell.offset < len(shell.text):
            parts.append(_read_escape(shell, quote))
        elif character == '"':
            quote = "" if quote else character
        elif character == "'" and not quote:
            quote = character
        elif character in "$`":
            parts.append(_read_expansion(shell, character, word))
        else:
            parts.append(character)
    word.text = "".join(parts)
    return word


def _read_escape(shell: _ShellReader, quote: str) -> str:
    character = shell.next_character()
    if character == "\n":
        return ""
    return character if not quote or character in '"\\$`' else f"\\{character}"


def _read_expansion(shell: _ShellReader, sign: str, word: Word) -> str:
    """Return the value of ``$NAME``, ``${NAME}``, ``$(...)`` or backquotes. If the value is not
    known, record this in ``word.unknown_part`` and return the text of the expression.
    """
    if sign == "`":
        return _skip_substitution(shell, word, "`", "`")
    if shell.peek() == "(":
        return _skip_substitution(shell, word, "$(", ")")
    if shell.peek() == "{":
        end = shell.text.find("}", shell.offset)
        end = len(shell.text) if end < 0 else end
        name, shell.offset = shell.text[shell.offset + 1 : end], end + 1
    else:
        match = _NAME.match(shell.text, shell.offset)
        name = match[0] if match else shell.peek()
        shell.offset += len(name)
    if name in shell.variables:
        return shell.variables[name]
    word.unknown_part = f"${name}"
    return f"${name}"


def _skip_substitution(shell: _ShellReader, word: Word, begin: str, end: str) -> str:
    stop = shell.text.find(end, shell.offset)
    stop = len(shell.text) - 1 if stop < 0 else stop
    inner = shell.text[shell.offset : stop + 1]
    shell.line += inner.count("\n")
    shell.offset = stop + 1
    word.unknown_part = "a command"
    return begin + inner.lstrip("(")


def parse_options(words: list[Word]) -> Iterator[tuple[str, Any, int]]:
    """Yield ``(name, value, line)`` for each option of a command. The forms are ``--name value``,
    ``--name=value``, ``--name a b`` (the value is a list) and ``--name`` (the value is True).
    Hyphens in names become underscores.
    """
    index = 0
    while index < len(words):
        word = words[index]
        index += 1
        if not word.text.startswith("--") or word.text == "--":
            continue
        name, equals, text = word.text[2:].partition("=")
        values = [Word(text, word.line, word.unknown_part).value] if equals else []
        while not equals and index < len(words) and not _is_flag(words[index].text):
            values.append(words[index].value)
            index += 1
        value = True if not values else values[0] if len(values) == 1 else values
        computed = next((one for one in values if isinstance(one, Computed)), None)
        yield name.replace("-", "_"), computed or value, word.line


def _is_flag(text: str) -> bool:
    return re.match(r"--?[A-Za-z]", text) is not None or text == "--"
