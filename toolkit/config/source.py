"""Define the source texts of a run file, positions in these texts, and size limits of a run file.

A position has a line and a column in characters. Both are counted from 1, as in editors. A position
also has offsets into ``Source.text``, which are counted from 0.
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
    """A source text: the content of a file, of standard input, or of one ``--set`` override."""

    name: str  # the name of the text in findings
    text: str
    folder: Path  # relative paths in this text start from this folder
    path: Path | None = None  # the path of the file; None for standard input and overrides
    format: str = "yaml"
    bom: str = ""  # the byte order mark of the file, which --fix writes again
    secret_positions: list[Position] = field(
        default_factory=list
    )  # positions of secrets, which no output may show

    @property
    def is_override(self) -> bool:
        """Whether this source text is a ``--set`` argument."""
        return self.format == "set"

    def hide_secret(self, position: Position) -> None:
        """Mark the characters at a position as a secret, so that no output shows them."""
        self.secret_positions.append(position)

    @cached_property
    def lines(self) -> list[str]:
        """The lines of the text, without line ends. CR LF, LF and CR end a line."""
        return self.text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


@dataclass(frozen=True, slots=True)
class Position:
    """The position of a scalar, key or collection in its source."""

    line: int
    column: int
    start: int
    end: int


def dotted(path: KeyPath) -> str:
    """Return a key path as text. For example, ``("reward", "functions", 0, "name")`` becomes
    ``reward.functions[0].name``.
    """
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text or "the run file"


# These limits are far above what a run file needs, and low enough that reading is always fast.
MAX_BYTES = 1 << 19
MAX_DEPTH = 40
MAX_NODES = 50_000
MAX_ALIASED_NODES = (
    5_000  # values that all YAML aliases together expand to; this stops an alias bomb early
)
MAX_DIGITS = (
    400  # a longer number is not converted, because int() of a million digits takes minutes
)
MAX_FINDINGS = 500  # further findings are only counted
MAX_SUGGESTIONS = 50  # unknown keys for which a similar key is searched
MAX_LAYERS = 16  # the longest chain of files that extend one another
PIPE_WAIT_S = 1.5

TOO_MANY_ALIASES = f"aliases expand to more than {MAX_ALIASED_NODES} values"
