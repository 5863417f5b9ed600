"""Resolve the paths in a run file.

A relative path in a file is relative to the folder of that file. A relative path in ``--set``, or
in a run file on standard input, is relative to the working directory. ``~`` is the home folder. The
values of ``model_name``, ``path`` and ``eval_path`` may be hub ids instead of paths. Such a value
is treated as a path if a file or folder with this path exists, or if the value cannot be a hub id.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.base.data_files import FILE_SUFFIXES, UNPACK_COMMANDS

if TYPE_CHECKING:
    from toolkit.config.document import Node

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?")
# The archive types that base/archives reads. The list is repeated here because importing that
# module is slow. A test compares the two lists.
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
DATA_SUFFIXES = (*FILE_SUFFIXES, *ARCHIVES, *UNPACK_COMMANDS)
LOCK_FILE = ".lock"
"""The name of the lock file in a run folder. A run keeps it locked while it writes to the folder.
"""
_KEYWORD_VALUES = {"resume": ("auto", "never", "must")}
_PATH_ONLY_KEYS = ("output_dir", "resume", "adapter_path", "python")


def resolve_path(text: str, node: Node) -> Path:
    """Return ``text`` as an absolute path. A relative path is relative to the folder of the file
    that contains ``node``.
    """
    return Path(_absolute_path(text, node))


def _absolute_path(text: str, node: Node) -> str:
    expanded = os.path.expanduser(text) if text.startswith("~") else text
    return os.path.normpath(os.path.join(node.source.folder, expanded))


def path_exists(path: Path | str) -> bool:
    """Whether ``path`` exists. The result is False if ``path`` cannot be the name of a file."""
    try:
        return os.path.exists(path)
    except (OSError, ValueError):
        return False


def is_path_only(text: str) -> bool:
    """Whether ``text`` can only be a path and not a hub id. This is the case if ``text`` begins
    like a path, ends like the name of a data file, or is not a valid hub id.
    """
    return (
        text.startswith((".", "/", "~"))
        or text.lower().endswith(DATA_SUFFIXES)
        or _HUB_ID.fullmatch(text) is None
    )


def local_path(key: str, node: Node) -> str:
    """Return the value of the run file key ``key``. ``node`` contains the value. If the value is a
    path, the result is the absolute path. If it is a hub id or a keyword (such as "auto" for
    ``resume``), the result is the unchanged value.
    """
    text = str(node.value)
    if text in _KEYWORD_VALUES.get(key, ()):
        return text
    path = _absolute_path(text, node)
    if key in _PATH_ONLY_KEYS or is_path_only(text) or path_exists(path):
        return path
    return text
