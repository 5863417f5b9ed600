"""Write an adapter as a PEFT folder.

The weights are written only as safetensors, and atomically. The same adapter always gives the same
bytes.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load

from toolkit.base import disk_errors
from toolkit.base.errors import ConfigValueError, InputError, first_line
from toolkit.base.files import FIX_GET_AGAIN, MAX_ADAPTER_BYTES, read_bytes
from toolkit.base.paths import set_mode
from toolkit.engine.mesh import current_mesh
from toolkit.engine.shards import gather_full_tensor
from toolkit.policy.fingerprint import current_base_digests
from toolkit.policy.model_files import ADAPTER_CONFIG

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from transformers import PreTrainedModel


def read_tensors(file: Path, *, limit: int = MAX_ADAPTER_BYTES) -> dict[str, torch.Tensor]:
    """Read the tensors of a safetensors file. Raises InputError if the file cannot be read or is
    larger than ``limit`` bytes.
    """
    try:
        tensors: dict[str, torch.Tensor] = load(read_bytes(file, limit=limit))
    except (SafetensorError, ValueError, KeyError, RuntimeError, OverflowError) as error:
        raise InputError(
            f"the file cannot be read as safetensors: {first_line(error)}",
            where=str(file),
            fix=FIX_GET_AGAIN,
        ) from error
    return tensors


BASE_FILE = "base.json"
"""The file that identifies the adapter's base model, so that the adapter is not used with another
model. It is written next to PEFT's files.
"""


def save_lora(
    model: PreTrainedModel, folder: str | os.PathLike[str], *, name: str = "default"
) -> Path:
    """Write the adapter ``name`` of ``model`` to ``folder`` and return the folder. The same adapter
    gives the same bytes.

    The files are first written to a temporary folder and then moved to ``folder``. If the disk is
    full or the process is killed before the move, the previous files in ``folder`` are unchanged.
    If several processes share a model, all of these processes must call this function. Only the
    first one writes.

    Raises:
        ConfigValueError: the model has no adapter.
        InputError: the folder cannot be written.
    """
    if name not in getattr(model, "peft_config", {}):
        raise ConfigValueError(
            "the model has no adapter to save", where="save_lora", fix="call get_peft_model first"
        )
    target, model_mesh, state_dict = Path(folder), current_mesh(), None
    if model_mesh is not None:
        named_parameters = model.named_parameters()
        state_dict = {
            key: gather_full_tensor(value) for key, value in named_parameters if "lora_" in key
        }
        if not model_mesh.is_first:
            return target
    with temporary_folder_beside(target) as temporary_folder:
        # PEFT's default for save_embedding_layers queries the hub for the base model's vocabulary
        # size. Passing True or False avoids the query.
        save_embeddings = bool(getattr(model, "toolkit_resized", False))
        state_kwargs = {} if state_dict is None else {"state_dict": state_dict}
        model.save_pretrained(
            str(temporary_folder),
            selected_adapters=[name],
            save_embedding_layers=save_embeddings,
            **state_kwargs,
        )
        adapter_folder = temporary_folder if name == "default" else temporary_folder / name
        _sort_config_lists(adapter_folder / ADAPTER_CONFIG)
        digests = current_base_digests(model)
        base_facts = {
            "base_model_name_or_path": base_model_name(model),
            "checkpoint": digests.checkpoint,
            "fingerprint": digests.weights,
        }
        (adapter_folder / BASE_FILE).write_text(
            json.dumps(base_facts, indent=2, sort_keys=True) + "\n"
        )
        for file in adapter_folder.iterdir():
            set_mode(file)
        target.mkdir(parents=True, exist_ok=True)
        for file in sorted(adapter_folder.iterdir(), key=lambda path: path.name == ADAPTER_CONFIG):
            os.replace(file, target / file.name)
    return target


@contextmanager
def temporary_folder_beside(target: Path) -> Iterator[Path]:
    """Yield a temporary folder on the same file system as ``target``. The folder is deleted after
    the ``with`` block.

    Raises:
        ConfigError: in the ``with`` block, the disk was full, or a file exceeded a size limit.
        NodeError: in the ``with`` block, the disk failed (for example, an input/output error).
        InputError: the temporary folder cannot be created, or the ``with`` block raised any other
            OSError or SafetensorError (for example, if a permission is missing).
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary_folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", where=str(target)) from error
    try:
        yield temporary_folder
    except (OSError, SafetensorError) as error:
        found, known = (
            disk_errors.find_failure(error),
            disk_errors.to_toolkit_error(error, target, kept_note=""),
        )
        if (
            known is not None
            and found is not None
            and found[0] not in disk_errors.NOT_WRITABLE_ERRNOS
        ):
            fix = "free space or choose another folder, then run the same command again"
            raise type(known)(known.message, where=known.where, fix=fix) from error
        raise InputError(f"cannot be written: {error}", where=str(target)) from error
    finally:
        shutil.rmtree(temporary_folder, ignore_errors=True)


def _sort_config_lists(path: Path) -> None:
    """Sort the lists in adapter_config.json. PEFT writes sets in hash order, which differs between
    processes.
    """
    values = json.loads(path.read_text(encoding="utf-8"))
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(values.get(key), list):
            values[key] = sorted(values[key])
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def base_model_name(model: PreTrainedModel) -> str | None:
    """Return the name or folder that the base model was loaded from, or None if it is unknown."""
    name = getattr(model, "name_or_path", None)
    return str(name) if name else None
