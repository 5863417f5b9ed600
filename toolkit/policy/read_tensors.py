"""Tensors out of a safetensors file of the user's, read with limits and not mapped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load

from toolkit.base.errors import InputError, first_line
from toolkit.base.files import FIX_AGAIN, MAX_ADAPTER_BYTES, read_bytes

if TYPE_CHECKING:
    from pathlib import Path

    import torch


def read_tensors(file: Path, *, limit: int = MAX_ADAPTER_BYTES) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file of at most ``limit`` bytes. Raises InputError."""
    try:
        tensors: dict[str, torch.Tensor] = load(read_bytes(file, limit=limit))
    except (SafetensorError, ValueError, KeyError, RuntimeError, OverflowError) as error:
        raise InputError(
            f"the file cannot be read as safetensors: {first_line(error)}",
            where=str(file),
            fix=FIX_AGAIN,
        ) from error
    return tensors
