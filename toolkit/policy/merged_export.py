"""Merge an adapter into its base model, and write the result as a plain transformers checkpoint.

The merged weight of an adapted layer is W + s B A, rounded once.
"""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from toolkit.base.errors import ConfigValueError, UnsupportedError
from toolkit.base.paths import set_modes
from toolkit.policy.adapter_io import BASE_FILE, temporary_folder_beside
from toolkit.policy.hf_model import load_base
from toolkit.policy.load_arguments import DTYPES
from toolkit.policy.lora import merge_into_base
from toolkit.policy.lora_settings import EMBEDDINGS
from toolkit.policy.model_files import ADAPTER_CONFIG
from toolkit.policy.saved_adapter import ADAPTER_WEIGHTS, add_saved_adapter
from toolkit.policy.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from toolkit.policy.load_request import LoadRequest
    from toolkit.policy.model_files import Checkpoint
    from toolkit.policy.saved_adapter import Adapter

WHERE = "export"


def merge_adapter(
    checkpoint: Checkpoint,
    adapter: Adapter,
    request: LoadRequest,
    target: Path,
    *,
    dtype: str = "auto",
) -> Path:
    """Merge ``adapter`` into the weights of the base ``checkpoint``, and write the result and the
    tokenizer to the folder ``target``. Returns the folder.

    The sum is computed in float32 and rounded once to ``dtype``, where "auto" means the dtype of
    the checkpoint. If ``dtype`` is float32, the logits equal those of base model plus adapter,
    except for the order of additions (about 1e-5). If ``dtype`` is bfloat16, an update below half a
    unit in the last place of the weight is lost. If the adapter was trained on the model in 4 bits,
    it is merged into the unquantized weights of the checkpoint.

    Raises:
        ConfigValueError: ``target`` is not empty, or the adapter belongs to another base model.
        UnsupportedError: the adapter is on embeddings or head, and these are tied to each other.
        InputError: a file cannot be read or written.
    """
    if dtype not in DTYPES:
        raise ConfigValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}", where=WHERE)
    check_empty(target)
    base_request = replace(
        request,
        dtype=stored_dtype(checkpoint) if dtype == "auto" else dtype,
        load_in_4bit=False,
        load_in_8bit=False,
        load_in_16bit=False,
        fast_inference=False,
        device_map="cpu",
    )
    base = load_base(checkpoint, base_request)
    _check_tied_tensors(base, adapter)
    # If the adapter was trained on a 4-bit model, there is no digest of the base model's weights.
    # Then a wrong base model may be detected only by the names and shapes of the tensors.
    model = merge_into_base(add_saved_adapter(base, adapter))
    tokenizer = load_tokenizer(
        checkpoint.folder, max_seq_length=None, trust_remote_code=request.trust_remote_code
    )
    with write_then_rename(target) as temporary_folder:
        model.save_pretrained(str(temporary_folder))
        tokenizer.save_pretrained(str(temporary_folder))
    return target


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, target: Path) -> Path:
    """Write a model that was trained with full fine-tuning, and its tokenizer, to the folder
    ``target``. If the folder exists, it is replaced. Returns the folder.

    Raises:
        InputError: a file cannot be written.
    """
    with temporary_folder_beside(target) as temporary_folder:
        model.save_pretrained(str(temporary_folder))
        tokenizer.save_pretrained(str(temporary_folder))
        set_modes(temporary_folder)
        if target.exists():
            shutil.rmtree(target)
        temporary_folder.rename(target)
    return target


def _check_tied_tensors(base: Any, adapter: Adapter) -> None:
    """Raise an error if the adapter is on a tensor that embeddings and head share (tied). A merge
    into this tensor would change both layers.
    """
    adapted_embeddings = sorted(
        name for name in adapter.tensors if any(part in name for part in EMBEDDINGS)
    )
    if adapted_embeddings and base.config.tie_word_embeddings:
        raise UnsupportedError(
            f"the adapter changes {adapted_embeddings[0]}, but the embeddings and the head of this "
            "model share one tensor",
            where=str(adapter.folder),
            fix="export the adapter without --merge",
        )


def write_adapter(checkpoint: Checkpoint, adapter: Adapter, target: Path) -> Path:
    """Copy the files of ``adapter`` to the folder ``target``, and write the tokenizer of its base
    model there. The caller has already read and checked the adapter. Returns the folder.

    Raises:
        ConfigValueError: ``target`` is not empty.
        InputError: a file cannot be read or written.
    """
    check_empty(target)
    tokenizer = load_tokenizer(checkpoint.folder, max_seq_length=None)
    with write_then_rename(target) as temporary_folder:
        tokenizer.save_pretrained(str(temporary_folder))
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE_FILE, "README.md"):
            if (adapter.folder / name).is_file():
                shutil.copyfile(adapter.folder / name, temporary_folder / name)
    return target


def stored_dtype(checkpoint: Checkpoint) -> str:
    """Return the dtype in config.json, or ``float32`` if merging does not support that dtype or
    config.json has none.
    """
    values: dict[str, Any] = checkpoint.read_json("config.json")
    name = str(values.get("dtype") or values.get("torch_dtype") or "float32")
    return (
        name
        if name in DTYPES and isinstance(getattr(torch, name, None), torch.dtype)
        else "float32"
    )


def check_empty(target: Path) -> None:
    """Check that ``target`` does not exist or is an empty folder.

    Raises:
        ConfigValueError: ``target`` is a file, or a folder that is not empty.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigValueError(
            "the folder is not empty" if target.is_dir() else "the path is a file, not a folder",
            where=str(target),
            fix="choose a folder that does not exist yet",
        )


@contextmanager
def write_then_rename(target: Path) -> Iterator[Path]:
    """Yield a temporary folder next to ``target``, and rename it to ``target`` after the ``with``
    block. The files get the mode 0644, and the folder gets 0755. The bits of the umask are cleared
    in both modes.
    """
    with temporary_folder_beside(target) as temporary_folder:
        yield temporary_folder
        set_modes(temporary_folder)
        if target.exists():
            target.rmdir()
        temporary_folder.rename(target)
