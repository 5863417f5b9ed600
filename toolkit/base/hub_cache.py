"""Find models of the Hugging Face hub on this machine, by the rules of huggingface_hub.

The network is never used. Rules, checks and commands use this module, so all of them find the same
files.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

MODEL_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def hub_home(environ: Mapping[str, str]) -> Path:
    """The folder in which huggingface_hub keeps its files. This is the value of HF_HOME. If HF_HOME
    is not set, it is the folder huggingface/ in the user's cache folder.
    """
    caches = Path(environ.get("XDG_CACHE_HOME") or "~/.cache")
    return Path(environ.get("HF_HOME") or caches / "huggingface").expanduser()


def hub_cache(environ: Mapping[str, str]) -> Path:
    """The folder of the cached models. This is the value of HF_HUB_CACHE. If HF_HUB_CACHE is not
    set, it is the folder hub/ in ``hub_home``.
    """
    return Path(environ.get("HF_HUB_CACHE") or hub_home(environ) / "hub").expanduser()


def cached_model(name: str, revision: str | None, environ: Mapping[str, str]) -> Path | None:
    """Return the snapshot folder of a cached model at a branch, a tag or a commit (None: the branch
    main). Return None if the model is not cached, or if ``name`` or ``revision`` is not valid on
    the hub.
    """
    if not MODEL_ID.fullmatch(name) or ".." in name:
        return None
    folder = hub_cache(environ) / f"models--{name.replace('/', '--')}"
    commit = _resolve_commit(folder, revision or "main")
    snapshot = folder / "snapshots" / commit if commit else None
    return snapshot if snapshot is not None and os.path.isdir(snapshot) else None


def _resolve_commit(folder: Path, revision: str) -> str | None:
    if _COMMIT.fullmatch(revision):
        return revision
    if not re.fullmatch(r"[\w./-]+", revision) or ".." in revision or revision.startswith("/"):
        return None
    try:
        commit = (folder / "refs" / revision).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return commit if _COMMIT.fullmatch(commit) else None
