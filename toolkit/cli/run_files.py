"""Find the run files of the arguments: files, folders, patterns, standard input."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from toolkit.base.errors import InputError
from toolkit.config.layers import load_document

if TYPE_CHECKING:
    from collections.abc import Iterator


def expand(arguments: tuple[str, ...]) -> Iterator[str]:
    """The run files of the arguments.

    Those of a folder or a pattern are sorted. Raises InputError for a folder or a pattern without
    run files.
    """
    for argument in arguments:
        if argument == "-":
            yield argument
        elif os.path.isdir(argument):
            found = sorted(_in_folder(argument))
            if not found:
                raise InputError(
                    "contains no run file", where=argument, fix="*.yaml, *.toml, *.json"
                )
            yield from found
        elif not os.path.lexists(argument) and any(mark in argument for mark in "*?["):
            import glob  # noqa: PLC0415 - most shells have expanded it

            found = sorted(glob.glob(argument, recursive=True))
            if not found:
                raise InputError("matches no file", where=argument)
            for one in found:
                if not os.path.isdir(one):
                    yield one
        else:
            yield argument


def _in_folder(folder: str) -> Iterator[str]:
    """YAML and TOML files, and JSON files with a model section (other JSON files are data)."""
    for parent, folders, files in os.walk(folder):
        folders[:] = [one for one in folders if not one.startswith(".")]
        for file in files:
            path, suffix = os.path.join(parent, file), os.path.splitext(file)[1].lower()
            if suffix in (".yaml", ".yml", ".toml") or (
                suffix == ".json" and "model" in load_document(path).root.value
            ):
                yield path
