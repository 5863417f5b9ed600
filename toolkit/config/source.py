"""Source texts of a run file, positions in them, and limits on their size.

Positions are 1-based lines and columns in characters, as editors count them; offsets are 0-based
into ``Source.text``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from pathlib import Path

KeyPath: TypeAlias = tuple[str | int, ...]


@dataclass(frozen=True, eq=False)
class Source:
    """A source text: a file, standard input, or one ``--set`` override."""

    name: str  # the name that findings show
    text: str
    folder: Path  # the folder that relative paths in this text are relative to
    path: Path | None = None  # the path of the file; None for standard input and overrides
    format: str = "yaml"
    bom: str = ""  # the unchanged bytes, for --fix
    hidden: list[Position] = field(default_factory=list)  # secrets, which are never shown

    @property
    def is_override(self) -> bool:
        """Whether this text is one ``--set`` argument."""
        return self.format == "set"

    def hide(self, mark: Position) -> None:
        """Hide these characters in all output, because they are a secret."""
        self.hidden.append(mark)

    @cached_property
    def lines(self) -> list[str]:
        """The lines without line ends, split where YAML, JSON and TOML count lines."""
        return self.text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


@dataclass(frozen=True, slots=True)
class Position:
    """The position of a scalar, key or collection in its source."""

    line: int
    column: int
    start: int
    end: int


def dotted(path: KeyPath) -> str:
    """``("reward", "functions", 0, "name")`` as ``reward.functions[0].name``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text or "the run file"


# Far above what a run needs, and low enough that reading is always fast.
MAX_BYTES = 1 << 19
MAX_DEPTH = 40
MAX_NODES = 50_000
MAX_ALIASED = 5_000  # values that aliases expand to; an alias bomb is detected early
MAX_DIGITS = 400  # a longer number stays text, because int() of a million digits takes minutes
MAX_FINDINGS = 500  # further findings are only counted
MAX_SUGGESTIONS = 50  # unknown keys that get a did-you-mean
MAX_LAYERS = 16  # files that extend one another
PIPE_WAIT_S = 1.5

TOO_ALIASED = f"aliases expand to more than {MAX_ALIASED} values"
