"""Resolve the paths in a run file.

A relative path is relative to the folder of the file that contains it. With ``--set``, or in a run
file on standard input, it is relative to the working folder. ``~`` is the home folder.
``model_name``, ``path`` and ``eval_path`` may also be a hub id. They are read as a path if that
path exists, or if the text cannot be a hub id.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.base.data_files import FILE_SUFFIXES, OTHER_PACKERS

if TYPE_CHECKING:
    from toolkit.config.document import Node

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?")
# The file types that base/archives reads (importing it is slow; a test compares the two lists).
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
DATA_SUFFIXES = (*FILE_SUFFIXES, *ARCHIVES, *OTHER_PACKERS)
LOCK_FILE = ".lock"
"""The name of the file in a run folder that a run keeps locked while it writes there."""
_WORDS = {"resume": ("auto", "never", "must")}
_ALWAYS = ("output_dir", "resume", "adapter_path", "python")


def resolve(text: str, node: Node) -> Path:
    """``text`` as an absolute path, relative to the file that contains ``node``."""
    return Path(_absolute(text, node))


def _absolute(text: str, node: Node) -> str:
    home = os.path.expanduser(text) if text.startswith("~") else text
    return os.path.normpath(os.path.join(node.source.folder, home))


def exists(path: Path | str) -> bool:
    """Whether ``path`` exists. A name that no file system accepts does not exist."""
    try:
        return os.path.exists(path)
    except (OSError, ValueError):
        return False


def is_path_only(text: str) -> bool:
    """Whether ``text`` cannot be a hub id: it is spelled as a path, or names a data file."""
    return (
        text.startswith((".", "/", "~"))
        or text.lower().endswith(DATA_SUFFIXES)
        or _HUB_ID.fullmatch(text) is None
    )


def local_path(key: str, node: Node) -> str:
    """The value of a key that may name a path: absolute if it is a path, unchanged if it is a hub
    id or a word.
    """
    text = str(node.value)
    if text in _WORDS.get(key, ()):
        return text
    path = _absolute(text, node)
    if key in _ALWAYS or is_path_only(text) or exists(path):
        return path
    return text
