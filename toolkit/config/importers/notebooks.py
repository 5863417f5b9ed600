"""Read the settings in notebooks. The code cells are joined to one script, without magics (lines
that begin with % or !). Nothing is executed.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from toolkit.base.files import parse_json
from toolkit.config.importers.foreign import ForeignConfig, UnreadPart
from toolkit.config.importers.scripts import read_script
from toolkit.config.importers.syntax import parse

if TYPE_CHECKING:
    from collections.abc import Iterator

# Cell magics in whose cells the code is Python.
_PYTHON_CELL_MAGIC = re.compile(r"%%(capture|time|timeit|prun)\b")
_MAGIC = re.compile(r"(\s*)(%|!)")
_NOT_PYTHON = "this line is a notebook magic, not Python"
_INSTALL = re.compile(r"\s*[!%]\s*(uv |python3? -m )?(pip|conda|uv|apt|apt-get)\b")


def read_notebook(raw: bytes, name: str) -> ForeignConfig:
    """Return the settings in a notebook. ``raw`` is the content of the notebook file, and ``name``
    is its name. Raises InputError if the content is not JSON, and ValueError if it has no cells.
    """
    lines: list[str] = []
    locations: list[str] = []
    unread: list[UnreadPart] = []
    for number, source in _code_cells(parse_json(raw, name)):
        code_lines = _code_lines(source, number, unread)
        try:
            parse("\n".join(code_lines))
        except ValueError as error:
            unread.append(
                UnreadPart(
                    f"cell {number}", _first_text(code_lines), f"the cell is not Python: {error}"
                )
            )
            continue
        lines += code_lines
        locations += [f"cell {number}, line {line}" for line in range(1, len(code_lines) + 1)]
    foreign = read_script("\n".join(lines), lambda line: locations[line - 1])
    foreign.unread[:0] = unread
    return foreign


def _code_cells(notebook: Any) -> Iterator[tuple[int, str]]:
    """Yield the pair ``(number, source)`` for each code cell. ``number`` counts the
    cells from 1.
    """
    cells = notebook.get("cells") if isinstance(notebook, dict) else None
    sheets = notebook.get("worksheets") if isinstance(notebook, dict) else None
    if cells is None and isinstance(sheets, list) and sheets and isinstance(sheets[0], dict):
        cells = sheets[0].get("cells")  # notebook format 3
    if not isinstance(cells, list):
        raise ValueError("the notebook has no cells")
    for number, cell in enumerate(cells, 1):
        if isinstance(cell, dict) and cell.get("cell_type") == "code":
            source = cell.get("source", cell.get("input", ""))
            text = "".join(map(str, source)) if isinstance(source, list) else str(source)
            yield number, text


def _code_lines(source: str, number: int, unread: list[UnreadPart]) -> list[str]:
    """Return the lines of a code cell, with ``pass`` instead of each magic. Each magic is added to
    ``unread``.
    """
    lines = source.split("\n")
    first = next((line for line in lines if line.strip()), "")
    if first.startswith("%%") and not _PYTHON_CELL_MAGIC.match(first):
        unread.append(UnreadPart(f"cell {number}", first, "the cell is not Python"))
        return []
    code_lines: list[str] = []
    is_continued = False
    for line_number, line in enumerate(lines, 1):
        match = _MAGIC.match(line)
        if is_continued:
            code_lines.append("")
        elif match is None:
            code_lines.append(line)
            continue
        else:
            code_lines.append(f"{match[1]}pass")
            if not line.startswith("%%"):
                is_install = _INSTALL.match(line)
                why = "install the packages before the run" if is_install else _NOT_PYTHON
                unread.append(UnreadPart(f"cell {number}, line {line_number}", line.strip(), why))
        is_continued = line.rstrip().endswith("\\")
    return code_lines


def _first_text(lines: list[str]) -> str:
    return next((line.strip() for line in lines if line.strip()), "")
