"""Find the shapes of an engine's LoRA slots in the checkpoint, before the engine exists."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from toolkit.base.files import read_json
from toolkit.base.read_ahead import WEIGHTS_SUFFIX
from toolkit.engine.lora_kernels import LoraSlots, sizes_with_all_variants
from toolkit.engine.lora_tables import LayerShape

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from toolkit.engine.kernel_process import KernelJob

FUSED_LAYERS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""The layers that vLLM's model classes make from several layers of a checkpoint. A few families
fuse other layers, whose shapes are not found.
"""


def read_slots(job: KernelJob) -> LoraSlots:
    """Return what decides about the variants of the LoRA kernels, from the headers of the weights
    and config.json. Raises InputError if config.json cannot be read.
    """
    assert job.lora_rank is not None
    sizes = _layer_sizes(Path(job.folder), job.target_modules)
    return LoraSlots(
        shapes=frozenset(slot_shapes(sizes, job.lora_rank)),
        max_loras=job.max_loras,
        dtype=_lora_dtype(job),
        batch_sizes=sizes_with_all_variants(job.graph_sizes, job.max_tokens),
    )


def slot_shapes(
    layer_sizes: dict[str, dict[str, tuple[int, int]]], rank: int
) -> Iterator[LayerShape]:
    """Yield the shapes of the slots. ``layer_sizes`` maps the name of a module to the sizes (rows,
    columns) of its linear layers, by the last parts of their names.
    """
    for layers in layer_sizes.values():
        remaining = dict(layers)
        for parts in FUSED_LAYERS.values():
            if all(part in remaining for part in parts):
                sizes = [remaining.pop(part) for part in parts]
                yield LayerShape(tuple(rows for rows, _ in sizes), sizes[0][1], rank)
        for rows, columns in remaining.values():
            yield LayerShape((rows,), columns, rank)


def _layer_sizes(
    folder: Path, target_modules: Iterable[str] | None
) -> dict[str, dict[str, tuple[int, int]]]:
    sizes: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
    for path in sorted(folder.glob(f"*{WEIGHTS_SUFFIX}")):
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                module, _, layer = name.removesuffix(".weight").rpartition(".")
                if layer not in (target_modules or (layer,)) or ".experts." in name:
                    continue
                shape = tensors.get_slice(name).get_shape()
                if name.endswith(".weight") and len(shape) == 2:
                    sizes[module][layer] = (shape[0], shape[1])
    return sizes


def _lora_dtype(job: KernelJob) -> torch.dtype:
    """Return the dtype of the slots, which is that of the engine's model. By default vLLM computes
    in bfloat16 if the checkpoint has float32 weights.
    """
    config = read_json(Path(job.folder, "config.json"))
    stored = config.get("dtype") or config.get("torch_dtype")
    name = stored if job.dtype == "auto" else job.dtype.removeprefix("torch.")
    return torch.float16 if name in {"float16", "half"} else torch.bfloat16
