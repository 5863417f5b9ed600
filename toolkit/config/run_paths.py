"""What a path in a run file points at.

A relative path is relative to the folder of the file that it is written in; one given with
``--set``, or in a run file on standard input, to the working folder. ``~`` is the home folder.
``model_name``, ``path`` and ``eval_path`` may also be a hub id: they are taken as a path when
something is there, or when they can be nothing else.
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
# What base/archives reads (a test holds them together; importing that is slow).
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
DATA_SUFFIXES = (*FILE_SUFFIXES, *ARCHIVES, *OTHER_PACKERS)
_WORDS = {"resume": ("auto", "never", "must")}
_ALWAYS = ("output_dir", "resume", "adapter_path")


def resolve(text: str, node: Node) -> Path:
    """``text`` as an absolute path, seen from the file that ``node`` stands in."""
    return Path(_absolute(text, node))


def _absolute(text: str, node: Node) -> str:
    home = os.path.expanduser(text) if text.startswith("~") else text
    return os.path.normpath(os.path.join(node.source.folder, home))


def exists(path: Path | str) -> bool:
    """Whether something is at ``path``; a name that no file system takes is not there."""
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
    """The value of a key that may name a path: absolute if it does, as written if it is a hub id
    or a word.
    """
    text = str(node.value)
    if text in _WORDS.get(key, ()):
        return text
    path = _absolute(text, node)
    if key in _ALWAYS or is_path_only(text) or exists(path):
        return path
    return text
