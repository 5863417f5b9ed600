"""Compile vLLM's LoRA kernels in several threads while the engine reads the weights.

Without a cache, Triton compiles a variant of a kernel when the variant is first launched. The start
and the first steps of a run need about 35 variants of vLLM's two LoRA kernels, which take 15 s to
compile one after the other (8B model, H200). Usually ``engine.kernel_process`` has compiled them
before. Then the threads of this module find them in Triton's cache.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from vllm.model_executor.layers.linear import LinearBase

from toolkit.engine import kernel_process
from toolkit.engine.lora_kernels import LoraSlots, compile_lora_kernels, sizes_with_all_variants
from toolkit.engine.lora_tables import LayerShape
from toolkit.engine.vllm_internals import device_type

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import nn
    from vllm.config import VllmConfig


@contextmanager
def compiled_lora_kernels(model: nn.Module, vllm_config: VllmConfig) -> Iterator[None]:
    """A context manager that compiles the LoRA kernels for ``model`` in other threads while its
    body runs. At the end of the body it waits for them. Without LoRA or CUDA it does nothing.

    Use it while no LoRA kernel is launched. If a kernel does not compile, no error is raised here.
    The kernel is compiled again when it is first launched.
    """
    if vllm_config.lora_config is None or device_type() != "cuda":
        yield
        return
    # A new thread uses device 0 until it chooses another one.
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    slots = lora_slots(model, vllm_config)
    thread = threading.Thread(target=_compile, args=(device, slots), name="lora-compile")
    thread.start()
    try:
        yield
    finally:
        thread.join()


def lora_slots(model: nn.Module, vllm_config: VllmConfig) -> LoraSlots:
    """Return what decides about the variants of the LoRA kernels for ``model``."""
    config = vllm_config.lora_config
    return LoraSlots(
        shapes=frozenset(lora_shapes(model, config.target_modules, config.max_lora_rank)),
        max_loras=config.max_loras,
        dtype=config.lora_dtype,
        batch_sizes=sizes_with_all_variants(
            vllm_config.compilation_config.cudagraph_capture_sizes or (),
            vllm_config.scheduler_config.max_num_batched_tokens,
        ),
    )


def lora_shapes(
    model: nn.Module, target_modules: Iterable[str] | None, rank: int
) -> set[LayerShape]:
    """Return the shapes of the layers of ``model`` that get LoRA slots of rank ``rank``. If
    ``target_modules`` (the last parts of layer names) is None, all linear layers get slots. With
    tensor parallelism, the shapes are those of the part of each layer in this process.

    A fused layer has one slice per layer of the checkpoint (``packed_modules_mapping``). In some
    checkpoints, such as those of Phi-3, the layers are already fused.
    """
    shapes = set()
    packed_modules = getattr(model, "packed_modules_mapping", {})
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(module, LinearBase) and (target_modules is None or leaf in target_modules):
            columns = getattr(module, "input_size_per_partition", module.input_size)
            rows = tuple(getattr(module, "output_partition_sizes", None) or [module.output_size])
            slices = rows if len(packed_modules.get(leaf, ())) > 1 else (sum(rows),)
            shapes.add(LayerShape(slices, columns, rank))
    return shapes


def _compile(device: int | None, slots: LoraSlots) -> None:
    try:
        kernel_process.wait_for_lora_kernels()
        with nullcontext() if device is None else torch.cuda.device(device):
            compile_lora_kernels(slots)
    except Exception:  # noqa: BLE001 - a kernel that is not compiled here is compiled at its launch
        return
