"""Compute a checksum of the base model's weights. The checksum is fast enough to be computed before
and after every run.

The bytes of each frozen tensor are read as 64-bit integers and summed, modulo 2^64, on the tensor's
device. The computation needs one pass over the weights. Nothing is copied or rounded. If no weight
changes, every checksum stays the same.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, NamedTuple

import torch

from toolkit.policy.fingerprint import ADAPTER_NAME_PARTS, unwrapped_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

PEFT_PREFIX = "base_model.model."
CHUNK_BYTES = 1 << 24
"""The number of bytes that are summed at once if a tensor's memory is not aligned to 8 bytes, and
so cannot be read as 64-bit integers.
"""

CHECKSUMS_ATTRIBUTE = "toolkit_base_sums"
"""The name of the model attribute that stores the sums from the time when the model was created.
Models that share their weights with an engine have it.
"""


class Checksum(NamedTuple):
    """The checksum of one tensor, with the tensor's dtype and shape. If two checksums have
    different dtypes or shapes, ``changed_tensors`` does not compare them, and does not
    report the tensor.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    value: int


def base_checksums(model: PreTrainedModel) -> dict[str, Checksum]:
    """Return the checksum of every frozen tensor of the base model. The keys are the parameter
    names without the parts that PEFT's wrappers add.
    """
    tensors, sums = [], []
    for name, parameter in model.named_parameters():
        is_adapter = any(part in name for part in ADAPTER_NAME_PARTS)
        if not is_adapter and not parameter.requires_grad and parameter.device.type != "meta":
            tensors.append((unwrapped_name(name.removeprefix(PEFT_PREFIX)), parameter))
            sums.append(_sum_bytes(parameter.data))
    return {
        name: Checksum(tensor.dtype, tuple(tensor.shape), value)
        for (name, tensor), value in zip(tensors, _to_ints(sums), strict=True)
    }


def changed_tensors(before: Mapping[str, Checksum], after: Mapping[str, Checksum]) -> list[str]:
    """Return the names of the tensors whose values differ between ``before`` and ``after``. Tensors
    whose dtype or shape differs are not compared.
    """
    return [
        name
        for name, checksum in after.items()
        if name in before and checksum[:2] == before[name][:2] and checksum != before[name]
    ]


def checksums_digest(sums: Mapping[str, Checksum]) -> str:
    """Return one short checksum of the checksums of all tensors."""
    lines = [
        f"{name} {checksum.dtype} {checksum.shape} {checksum.value}"
        for name, checksum in sums.items()
    ]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]


def _sum_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the checksum of a tensor's bytes, as a 0-dimensional int64 on its device."""
    # Use a plain tensor, because bitsandbytes' parameter class overrides slicing.
    plain_tensor = tensor.detach().as_subclass(torch.Tensor)
    flat = plain_tensor.contiguous().reshape(-1).view(torch.uint8)
    aligned_length = flat.numel() - flat.numel() % 8
    if flat.storage_offset() % 8 == 0 and flat.data_ptr() % 8 == 0:
        aligned_sum = flat[:aligned_length].view(torch.int64).sum()
        return aligned_sum + flat[aligned_length:].sum(dtype=torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for number, chunk in enumerate(torch.split(flat, CHUNK_BYTES), start=1):
        total += number * chunk.sum(dtype=torch.int64)
    return total


def _to_ints(values: list[torch.Tensor]) -> list[int]:
    """Convert the checksums to ints. All checksums of a device are copied to the host at once,
    because a copy for each checksum would be slower.
    """
    value_by_index: dict[int, int] = {}
    for device in {value.device for value in values}:
        indices = [index for index, value in enumerate(values) if value.device == device]
        device_values = torch.stack([values[index] for index in indices]).tolist()
        value_by_index.update(zip(indices, device_values, strict=True))
    return [value_by_index[index] for index in range(len(values))]
