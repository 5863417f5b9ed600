"""Load a run file: parse it, check its structure, apply the rules, and build the frozen RunConfig.
The parsers record the position of each value, so that messages can show it.

The trainer and the sizer call ``load_run(path, overrides)``. The names of this package are imported
on first use. Importing only ``toolkit.config.run_config`` therefore does not import a YAML parser.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolkit.config.document import Document
    from toolkit.config.document_loader import load_document
    from toolkit.config.finding import Finding
    from toolkit.config.run_config import RunConfig
    from toolkit.config.schemas import find_schema
    from toolkit.config.validate import Validation, check_instance, load_run

__all__ = [
    "Document",
    "Finding",
    "RunConfig",
    "Validation",
    "check_instance",
    "find_schema",
    "load_document",
    "load_run",
]

_MODULE_BY_NAME = {
    "Document": "document",
    "Finding": "finding",
    "RunConfig": "run_config",
    "Validation": "validate",
    "check_instance": "validate",
    "find_schema": "schemas",
    "load_document": "document_loader",
    "load_run": "validate",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_BY_NAME:
        raise AttributeError(f"module 'toolkit.config' has no attribute {name!r}")
    from importlib import import_module  # noqa: PLC0415 - imported on first use

    return getattr(import_module(f"toolkit.config.{_MODULE_BY_NAME[name]}"), name)
