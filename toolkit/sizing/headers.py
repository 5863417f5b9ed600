"""Read safetensors headers without the safetensors library and without trusting the file.

The format (huggingface/safetensors, README "Format"): a file begins with eight bytes that contain a
little-endian number N. The next N bytes are JSON, which maps the name of each tensor to its dtype,
shape and data offsets. A wrong value in a file raises ``InputError``. Reading takes limited time
and memory, and no weights are read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeGuard

from toolkit.base.files import (
    open_regular,
    parse_json,
    read_exactly,
    read_json,
    unusable_file_error,
)

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from toolkit.base.errors import InputError

# Headers of real checkpoints are below 2 MiB; the format itself allows 100 MB.
MAX_HEADER_BYTES = 32 << 20
MAX_SHARDS = 4096
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
DOWNLOAD_FIX = "download the file again; it is truncated or was not written by safetensors"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One entry of a header: the dtype of a tensor, as safetensors names it, and its shape."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeights:
    """The tensors that the safetensors headers of a checkpoint list. ``files``, ``nbytes`` and
    ``elements`` are the numbers of files, bytes and elements of all tensors together.
    """

    files: int
    nbytes: int
    elements: int
    tensors: dict[str, StoredTensor] = field(repr=False)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file. Raises InputError if the header violates the format."""
    with open_regular(path) as (descriptor, size):
        if size < 8:
            raise _format_error(path, f"has {size} bytes, which is too short for a header")
        length = int.from_bytes(read_exactly(descriptor, 8, path), "little")
        if length > MAX_HEADER_BYTES:
            raise _format_error(
                path,
                f"states a header of {length} bytes; the limit is {MAX_HEADER_BYTES}",
            )
        if 8 + length > size:
            raise _format_error(
                path, f"ends inside its header: it has {size} bytes, the header {length}"
            )
        raw = read_exactly(descriptor, length, path)
    header = parse_json(raw, path)
    if not isinstance(header, dict):
        raise _format_error(path, "has a header that is not a mapping")
    header.pop("__metadata__", None)
    return _parse_entries(header, size - 8 - length, path)


def _parse_entries(header: dict[str, Any], data_bytes: int, path: Path) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        tensor, begin, end = _parse_entry(name, entry, path)
        if end > data_bytes:
            raise _format_error(path, f"is too short for its tensor {name[:80]!r}")
        tensors[name] = tensor
        spans.append((begin, end, name))
    spans.sort()
    previous_end = 0
    for begin, end, name in spans:
        if begin < previous_end:
            raise _format_error(path, f"has overlapping data offsets at {name[:80]!r}")
        previous_end = end
    return tensors


def _parse_entry(name: str, entry: object, path: Path) -> tuple[StoredTensor, int, int]:
    where = f"entry {name[:80]!r}"
    if not isinstance(entry, dict):
        raise _format_error(path, f"has a header whose {where} is not a mapping")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    bits = DTYPE_BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise _format_error(path, f"has an unknown dtype {str(dtype)[:20]!r} at {where}")
    if not _is_list_of_naturals(shape) or len(shape) > 8:
        raise _format_error(path, f"has an invalid shape at {where}")
    if not _is_list_of_naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _format_error(path, f"has invalid data offsets at {where}")
    tensor = StoredTensor(str(dtype), tuple(shape), offsets[1] - offsets[0])
    if tensor.elements * bits != tensor.nbytes * 8:
        raise _format_error(path, f"has a shape that does not match the data offsets at {where}")
    return tensor, offsets[0], offsets[1]


def _is_list_of_naturals(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 1 << 60
        for item in value
    )


def read_stored_weights(folder: Path) -> StoredWeights | None:
    """Read the headers of every safetensors shard in ``folder``. Return None if the folder contains
    no safetensors file. Raises InputError for a file that violates the format.
    """
    files = _find_shards(folder)
    if not files:
        return None
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        shard_tensors = read_header(file)
        if duplicate := next((name for name in shard_tensors if name in tensors), None):
            raise _format_error(
                file, f"contains the tensor {duplicate[:80]!r}, which is also in another shard"
            )
        tensors.update(shard_tensors)
    return StoredWeights(
        files=len(files),
        nbytes=sum(tensor.nbytes for tensor in tensors.values()),
        elements=sum(tensor.elements for tensor in tensors.values()),
        tensors=tensors,
    )


def _find_shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        values = read_json(index)
        weight_map = values.get("weight_map") if isinstance(values, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise _format_error(index, "has no weight_map")
        return [folder / name for name in _safe_names(weight_map.values(), index)]
    single = folder / "model.safetensors"
    if single.is_file() or single.is_symlink():
        return [single]
    return sorted(
        path
        for path in folder.glob("*.safetensors")
        if not path.name.startswith(("consolidated", "adapter_"))
    )[:MAX_SHARDS]


def _safe_names(names: Iterable[Any], index: Path) -> list[str]:
    """Return the distinct shard names. Raises InputError if a name leads outside the folder."""
    distinct = list(dict.fromkeys(name if isinstance(name, str) else "" for name in names))
    for name in distinct:
        if not name or "/" in name or "\\" in name or "\0" in name or name in (".", ".."):
            raise _format_error(index, f"lists a shard outside its folder: {name[:80]!r}")
    if len(distinct) > MAX_SHARDS:
        raise _format_error(index, f"lists {len(distinct)} shards; the limit is {MAX_SHARDS}")
    return sorted(distinct)


def _format_error(path: Path, what: str, *, fix: str | None = DOWNLOAD_FIX) -> InputError:
    """The error for a checkpoint file that violates the format."""
    return unusable_file_error(path, what, fix=fix)
