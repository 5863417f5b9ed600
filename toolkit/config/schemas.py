"""Find one of the project's JSON Schemas: in a checkout under schemas/, in an installed package
under toolkit/schemas/.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from toolkit.base.errors import DefectError, InputError

_FOLDERS = (Path(__file__).parents[1] / "schemas", Path(__file__).parents[2] / "schemas")


def schema_path(name: str) -> Path:
    """The file of schema ``name`` (``run``, ``report``, ``manifest`` ...). Raises InputError for an
    unknown name.
    """
    for folder in _FOLDERS:
        path = folder / f"{name}.schema.json"
        if name.isidentifier() and path.is_file():
            return path
    known = schema_names()
    if not known:
        raise DefectError(
            f"no schemas in {' or '.join(map(str, _FOLDERS))}: the installation is broken"
        )
    raise InputError(f"there is no schema {name!r}", fix="one of: " + ", ".join(known))


def schema_names() -> list[str]:
    """The names that ``schema_path`` knows, sorted."""
    files = (path for folder in _FOLDERS for path in folder.glob("*.schema.json"))
    return sorted({path.name.partition(".")[0] for path in files})


@cache
def find_schema(name: str) -> dict[str, Any]:
    """The schema as parsed JSON (one shared object: do not change it)."""
    schema = json.loads(schema_path(name).read_text(encoding="utf-8"))
    assert isinstance(schema, dict)
    return schema
