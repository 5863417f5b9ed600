"""Find out whether the files of a model are complete before anything loads the model. The model is
in a local folder or in a snapshot of the hub cache.

Only JSON files and directory listings are read, and their sizes are limited. Broken links and loops
of links are reported. The sizer, not this module, reads parameters and shapes.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.base.errors import InputError
from toolkit.base.files import MAX_FOLDER_FILES, read_json
from toolkit.base.hub_cache import MODEL_ID, cached_model
from toolkit.base.vllm_models import vllm_supports_any
from toolkit.gpu.driver_files import as_reading
from toolkit.gpu.reading import NOT_QUERIED, Reading, failed, succeeded, unsupported

if TYPE_CHECKING:
    from collections.abc import Mapping

_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|gguf)$")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


@dataclass(frozen=True, slots=True)
class ModelSnapshot:
    """What is known about a model's files.

    - ``location``: {kind: folder | cache | hub, path}.
    - ``files``: {count, weights, weight_bytes, empty_weights, dangling, unreadable, irregular,
      index, missing_shards}.
    - ``tokenizer``: the names of the tokenizer files.
    - ``config``: {architectures, model_type, quantization, needs_code}.
    - ``vllm_knows``: whether the installed vLLM's registry lists the architecture.
    """

    location: Reading[dict[str, Any]] = NOT_QUERIED
    files: Reading[dict[str, Any]] = NOT_QUERIED
    tokenizer: Reading[list[str]] = NOT_QUERIED
    config: Reading[dict[str, Any]] = NOT_QUERIED
    vllm_knows: Reading[bool] = NOT_QUERIED


def read(
    name: str, revision: str | None = None, environ: Mapping[str, str] = os.environ
) -> ModelSnapshot:
    """Return what is known about the files of the model ``name``, which is a folder or a hub id.
    The network is never used.
    """
    location = as_reading(lambda: locate(name, revision, environ))
    location_facts = location.value
    if location_facts is None or location_facts["kind"] == "hub":
        absent: Reading[Any] = unsupported("the model is not on this machine")
        return ModelSnapshot(location, absent, absent, absent, absent)
    folder = Path(location_facts["path"])
    config = _read_config(folder)
    return ModelSnapshot(
        location=location,
        files=as_reading(lambda: _scan_files(folder)),
        tokenizer=as_reading(lambda: [one for one in _TOKENIZERS if (folder / one).is_file()]),
        config=config,
        vllm_knows=_vllm_knows((config.value or {}).get("architectures") or []),
    )


def locate(name: str, revision: str | None, environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the location of the model's files as {kind, path}.

    Raises OSError for a path that does not exist or is not a folder.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return {"kind": "folder", "path": str(folder)}
    if folder.exists():
        raise NotADirectoryError(20, "not a folder", name)
    if not MODEL_ID.fullmatch(name) or name.startswith("."):
        raise FileNotFoundError(2, "no such folder", name)
    snapshot = cached_model(name, revision, environ)
    if snapshot is None:
        return {"kind": "hub", "path": name}
    return {"kind": "cache", "path": str(snapshot)}


def _read_json(path: Path) -> Any:
    """Return the content of a JSON file of limited size.

    Raises OSError if the file does not exist, and ValueError with the reason if the file cannot be
    read.
    """
    if not path.is_symlink() and not path.exists():
        raise FileNotFoundError(2, "no such file", str(path))
    try:
        return read_json(path)
    except InputError as error:
        raise ValueError(f"{path.name}: {error.message}"[:200]) from None


def _scan_files(folder: Path) -> dict[str, Any]:
    weights: dict[str, int] = {}
    dangling, unreadable, irregular, names = [], [], [], []
    with os.scandir(folder) as entries:
        entries_in_folder = list(islice(entries, MAX_FOLDER_FILES + 1))
    if len(entries_in_folder) > MAX_FOLDER_FILES:
        raise ValueError(
            f"the folder has more than {MAX_FOLDER_FILES} files, so it is not the folder of a model"
        )
    for entry in entries_in_folder:
        names.append(entry.name)
        try:
            status = entry.stat()
        except OSError:  # a broken link, or a loop of links
            dangling.append(entry.name)
            continue
        size = status.st_size
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            irregular.append(entry.name)
        elif not os.access(entry.path, os.R_OK):
            unreadable.append(entry.name)
        if _WEIGHTS.match(entry.name) and entry.name not in ("training_args.bin", "optimizer.pt"):
            weights[entry.name] = size
    indices = sorted(name for name in names if name.endswith(".index.json"))
    index = next((name for name in indices if "safetensors" in name), None)
    index = index or next(iter(indices), None)
    return {
        "count": len(names),
        "weights": len(weights),
        "weight_bytes": sum(weights.values()),
        "empty_weights": sorted(name for name, size in weights.items() if size == 0),
        "dangling": sorted(dangling),
        "unreadable": sorted(unreadable),
        "irregular": sorted(irregular),
        "index": index,
        "missing_shards": _missing_shards(folder / index, names) if index else [],
    }


def _missing_shards(index: Path, names: list[str]) -> list[str]:
    data = _read_json(index)
    shards = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{index.name} has no weight_map")
    return sorted({str(shard) for shard in shards.values()} - set(names))


def _read_config(folder: Path) -> Reading[dict[str, Any]]:
    try:
        data = _read_json(folder / "config.json")
    except FileNotFoundError:
        return failed("config.json does not exist")
    except (OSError, ValueError) as error:
        return failed(str(error)[:200])
    if not isinstance(data, dict):
        return failed("config.json is not an object")
    architectures = data.get("architectures")
    quantization = data.get("quantization_config")
    return succeeded(
        {
            "architectures": architectures
            if isinstance(architectures, list) and all(isinstance(a, str) for a in architectures)
            else [],
            "model_type": str(data.get("model_type", ""))[:80],
            "quantization": str(quantization.get("quant_method", ""))[:40]
            if isinstance(quantization, dict)
            else None,
            "needs_code": bool(data.get("auto_map")),
        }
    )


def _vllm_knows(architectures: list[str]) -> Reading[bool]:
    """Whether the registry of the installed vLLM lists one of the architectures."""
    is_supported = vllm_supports_any(architectures)
    if is_supported is None:
        return unsupported("vLLM is not installed")
    return succeeded(is_supported) if architectures else failed("config.json names no architecture")
