"""Find the JSON Schemas of the project. They are in schemas/ in a checkout, and in toolkit/schemas/
in an installed package.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from toolkit.base.errors import DefectError, InputError

_FOLDERS = (Path(__file__).parents[1] / "schemas", Path(__file__).parents[2] / "schemas")


def schema_path(name: str) -> Path:
    """Return the path of the file with the schema ``name`` (``run``, ``report``, ``manifest`` ...).
    Raises InputError if there is no such schema.
    """
    for folder in _FOLDERS:
        path = folder / f"{name}.schema.json"
        if name.isidentifier() and path.is_file():
            return path
    known = schema_names()
    if not known:
        raise DefectError(
            f"the installation is broken: there are no schemas in {' or '.join(map(str, _FOLDERS))}"
        )
    raise InputError(f"there is no schema {name!r}", fix="use one of " + ", ".join(known))


def schema_names() -> list[str]:
    """Return the names of all schemas, sorted."""
    files = (path for folder in _FOLDERS for path in folder.glob("*.schema.json"))
    return sorted({path.name.partition(".")[0] for path in files})


@cache
def find_schema(name: str) -> dict[str, Any]:
    """Return the schema ``name`` as parsed JSON. All callers share the returned object, so do not
    change it.
    """
    schema = json.loads(schema_path(name).read_text(encoding="utf-8"))
    assert isinstance(schema, dict)
    return schema
