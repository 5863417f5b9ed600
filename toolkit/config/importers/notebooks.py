"""Read the settings in notebooks. The code cells are joined to one script, without magics (lines
that begin with % or !). Nothing is executed.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from toolkit.base.files import parse_json
from toolkit.config.importers.foreign import Foreign, Unread
from toolkit.config.importers.scripts import read_script
from toolkit.config.importers.syntax import parse

if TYPE_CHECKING:
    from collections.abc import Iterator

# Cell magics in whose cells the code is Python.
_PYTHON = re.compile(r"%%(capture|time|timeit|prun)\b")
_MAGIC = re.compile(r"(\s*)(%|!)")
_NOT_PYTHON = "this line is a notebook magic, not Python"
_INSTALL = re.compile(r"\s*[!%]\s*(uv |python3? -m )?(pip|conda|uv|apt|apt-get)\b")


def read_notebook(raw: bytes, name: str) -> Foreign:
    """Return the settings in a notebook. ``raw`` is the content of the notebook file, and ``name``
    is its name. Raises InputError if the content is not JSON, and ValueError if it has no cells.
    """
    lines: list[str] = []
    places: list[str] = []
    unread: list[Unread] = []
    for number, source in _cells(parse_json(raw, name)):
        kept = _code(source, number, unread)
        try:
            parse("\n".join(kept))
        except ValueError as error:
            unread.append(
                Unread(f"cell {number}", _first(kept), f"the cell is not Python: {error}")
            )
            continue
        lines += kept
        places += [f"cell {number}, line {line}" for line in range(1, len(kept) + 1)]
    foreign = read_script("\n".join(lines), lambda line: places[line - 1])
    foreign.unread[:0] = unread
    return foreign


def _cells(notebook: Any) -> Iterator[tuple[int, str]]:
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


def _code(source: str, number: int, unread: list[Unread]) -> list[str]:
    """Return the lines of a code cell, with ``pass`` instead of each magic. Each magic is added to
    ``unread``.
    """
    lines = source.split("\n")
    first = next((line for line in lines if line.strip()), "")
    if first.startswith("%%") and not _PYTHON.match(first):
        unread.append(Unread(f"cell {number}", first, "the cell is not Python"))
        return []
    kept: list[str] = []
    continued = False
    for at, line in enumerate(lines, 1):
        found = _MAGIC.match(line)
        if continued:
            kept.append("")
        elif found is None:
            kept.append(line)
            continue
        else:
            kept.append(f"{found[1]}pass")
            if not line.startswith("%%"):
                is_install = _INSTALL.match(line)
                why = "install the packages before the run" if is_install else _NOT_PYTHON
                unread.append(Unread(f"cell {number}, line {at}", line.strip(), why))
        continued = line.rstrip().endswith("\\")
    return kept


def _first(lines: list[str]) -> str:
    return next((line.strip() for line in lines if line.strip()), "")
