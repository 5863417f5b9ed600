"""Compute a checksum of the base model's weights, cheap enough to compute before and after every
run.

Each frozen tensor is summed as 64-bit integers, modulo 2^64, on its own device: one pass over the
weights, without a copy or rounding. The sums are equal as long as no value changes.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from toolkit.policy.fingerprint import TRAINED, plain_name

if TYPE_CHECKING:
    from collections.abc import Mapping

PREFIX = "base_model.model."
CHUNK_BYTES = 1 << 24
"""Number of bytes that are widened at once if a tensor cannot be read as 64-bit integers."""

AT_LOAD = "toolkit_base_sums"
"""Attribute of a model that shares its weights with an engine: the sums when the model was
created.
"""


class Sum(NamedTuple):
    """The sum of one tensor, with its dtype and shape. Sums with different dtypes or shapes belong
    to different tensors, so they do not count as a change.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    value: int


def base_sums(model: Any) -> dict[str, Sum]:
    """The sum of every frozen tensor of the base model, by its name without PEFT's wrappers."""
    names, values = [], []
    for name, parameter in model.named_parameters():
        own = any(part in name for part in TRAINED)
        if not own and not parameter.requires_grad and parameter.device.type != "meta":
            names.append((plain_name(name.removeprefix(PREFIX)), parameter))
            values.append(_add_up(parameter.data))
    return {
        name: Sum(tensor.dtype, tuple(tensor.shape), value)
        for (name, tensor), value in zip(names, _to_host(values), strict=True)
    }


def changed(before: Mapping[str, Sum], after: Mapping[str, Sum]) -> list[str]:
    """The names of the tensors that have the same dtype and shape in ``before`` and ``after`` but
    different values.
    """
    return [
        name
        for name, found in after.items()
        if name in before and found[:2] == before[name][:2] and found != before[name]
    ]


def digest(sums: Mapping[str, Sum]) -> str:
    """One short checksum of all sums."""
    lines = [f"{name} {found.dtype} {found.shape} {found.value}" for name, found in sums.items()]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]


def _add_up(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor's bytes, as a 0-dimensional int64 on its device."""
    # Use a plain tensor, because bitsandbytes' parameter class overrides slicing.
    plain = tensor.detach().as_subclass(torch.Tensor)
    flat = plain.contiguous().reshape(-1).view(torch.uint8)
    whole = flat.numel() - flat.numel() % 8
    if flat.storage_offset() % 8 == 0 and flat.data_ptr() % 8 == 0:
        head = flat[:whole].view(torch.int64).sum()
        return head + flat[whole:].sum(dtype=torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for number, part in enumerate(torch.split(flat, CHUNK_BYTES), start=1):
        total += number * part.sum(dtype=torch.int64)
    return total


def _to_host(values: list[torch.Tensor]) -> list[int]:
    """The sums as ints, with one copy to the host per device instead of one per tensor."""
    found: dict[int, int] = {}
    for device in {value.device for value in values}:
        places = [index for index, value in enumerate(values) if value.device == device]
        told = torch.stack([values[index] for index in places]).tolist()
        found.update(zip(places, told, strict=True))
    return [found[index] for index in range(len(values))]
