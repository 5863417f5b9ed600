"""Find a model's files: a folder, a config.json, or a snapshot in the Hugging Face cache. Nothing
is downloaded.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from toolkit.base.errors import InputError
from toolkit.base.files import read_json
from toolkit.base.hub_cache import cached_model, hub_cache

_HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The files of a model. ``folder`` contains the weights; it is None if only a config.json was
    given. ``config`` is the config.json.
    """

    folder: Path | None
    config: Path
    revision: str | None


def find_model(name: str, revision: str | None = None) -> ModelFiles:
    """Find the files of a model. Raises InputError with the places that were searched."""
    if not name or "\0" in name:
        raise InputError(
            "the model's name is empty or contains a null byte",
            fix="give the folder or the hub id of a model",
        )
    path = Path(name).expanduser()
    if path.name == "config.json" or (path.suffix == ".json" and path.is_file()):
        return ModelFiles(path.parent if path.name == "config.json" else None, path, None)
    if path.is_dir():
        return _in_folder(path, None)
    if not _HUB_ID.fullmatch(name):
        raise InputError(
            f"{name!r} is neither an existing folder nor a valid hub id",
            fix="use a folder that contains config.json, or a hub id (ORGANISATION/NAME)",
        )
    return _in_cache(name, revision)


def _in_cache(name: str, revision: str | None) -> ModelFiles:
    snapshot = cached_model(name, revision, os.environ)
    if snapshot is None:
        raise InputError(
            f"{name} (revision {revision or 'main'}) is neither a folder nor in the cache"
            f" {hub_cache(os.environ)}",
            fix=f"run `hf download {name}`, or set HF_HOME to the cache that contains the model",
        )
    return _in_folder(snapshot, snapshot.name)


def _in_folder(folder: Path, revision: str | None) -> ModelFiles:
    config = folder / "config.json"
    if not config.is_file() and (folder / "adapter_config.json").is_file():
        adapter = read_json(folder / "adapter_config.json")
        base = adapter.get("base_model_name_or_path") if isinstance(adapter, dict) else None
        if not isinstance(base, str) or Path(base).expanduser().resolve() == folder.resolve():
            raise InputError(
                "the adapter does not name its base model",
                where=str(folder / "adapter_config.json"),
                fix="size the base model instead",
            )
        base_files = find_model(base)
        if (
            base_files.config.parent / "adapter_config.json"
        ).is_file() and not base_files.config.is_file():
            raise InputError(
                "the base model of this adapter is itself an adapter", where=str(folder)
            )
        return base_files
    if not config.exists():
        raise InputError(
            "config.json does not exist", where=str(folder), fix="give the model's own folder"
        )
    return ModelFiles(folder, config, revision)
