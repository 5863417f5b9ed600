"""Compile the variants of vLLM's two LoRA kernels without launching them.

vLLM's own functions decide which variants exist. The functions are copied, and called with empty
tensors in host memory. In the copies, an object that compiles but does not launch takes the place
of the kernel. So nothing is computed, and no GPU memory is used (vLLM 0.25.1 and 0.31.0).

This module imports only small parts of vLLM, because ``engine.kernel_worker`` must start fast.
"""

from __future__ import annotations

import inspect
import sys
import types
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from toolkit.base.files import read_json
from toolkit.engine.lora_tables import PREFILL_BATCH_SIZES, TUNED_BATCH_SIZES, LayerShape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from toolkit.engine.kernel_process import KernelJob


@dataclass(frozen=True, kw_only=True)
class LoraSlots:
    """What decides about the variants of the LoRA kernels: the ``shapes`` of the layers with slots,
    the number of slots per layer, the ``dtype`` of the slots, and ``batch_sizes`` in tokens.
    """

    shapes: frozenset[LayerShape]
    max_loras: int
    dtype: torch.dtype
    batch_sizes: tuple[int, ...]


def slots_of_job(job: KernelJob) -> LoraSlots:
    """Return what decides about the variants for the engine of ``job``. Raises InputError if the
    model's config.json cannot be read.

    The slots have the dtype of the engine's model. If the checkpoint has float32 weights, vLLM
    computes in bfloat16 by default.
    """
    config = read_json(Path(job.folder, "config.json"))
    stored_dtype = config.get("dtype") or config.get("torch_dtype")
    dtype = stored_dtype if job.dtype == "auto" else job.dtype
    return LoraSlots(
        shapes=frozenset(
            LayerShape(tuple(rows), columns, job.rank) for rows, columns in job.slot_shapes
        ),
        max_loras=job.max_loras,
        dtype=torch.float16 if dtype in {"float16", "half"} else torch.bfloat16,
        batch_sizes=sizes_with_all_variants(job.graph_sizes, job.max_tokens),
    )


def sizes_with_all_variants(graph_sizes: Iterable[int], max_tokens: int) -> tuple[int, ...]:
    """Return batch sizes (in tokens) that need every variant of the kernels. ``graph_sizes`` are
    the sizes of captured decode steps. ``max_tokens`` is the largest batch.

    Triton makes one variant for the sizes that 16 divides, and another one for the other sizes. So
    each size of a table is included together with the next size.
    """
    table_sizes = [*TUNED_BATCH_SIZES, *PREFILL_BATCH_SIZES]
    sizes = {*graph_sizes, *table_sizes, *(size + 1 for size in table_sizes), max_tokens}
    return tuple(sorted(size for size in sizes if size <= max_tokens))


def compile_lora_kernels(slots: LoraSlots) -> None:
    """Compile all variants of both LoRA kernels for ``slots``."""
    # Imported here, because triton is not installed on every machine with a CPU engine.
    from toolkit.engine.kernel_compile import compiled_together  # noqa: PLC0415

    try:
        with compiled_together() as add_variant:
            call_for_all_layers(slots, add_variant)
    finally:
        clear_pointer_cache()


def call_for_all_layers(slots: LoraSlots, add_variant: Callable[[Any], None]) -> None:
    """Call vLLM's two functions for each layer and each batch size of ``slots``. ``add_variant`` is
    called with Triton's object for each compiled variant.
    """
    shrink = _compiling_copy("lora_shrink_op", "_lora_shrink", add_variant)
    expand = _compiling_copy("lora_expand_op", "_lora_expand", add_variant)
    for shape in slots.shapes:
        for tokens in slots.batch_sizes:
            _call(shrink, expand, shape, tokens, slots)


def _compiling_copy(
    module_name: str, function_name: str, add_variant: Callable[[Any], None]
) -> Callable[..., None]:
    """Return a copy of vLLM's function that launches a LoRA kernel. The copy compiles the variant
    of the kernel that its arguments need, and does not launch it.
    """
    module = import_module(f"vllm.lora.ops.triton_ops.{module_name}")
    function: Any = inspect.unwrap(getattr(module, function_name))
    kernel_name = f"{function_name}_kernel"
    copy = types.FunctionType(
        function.__code__,
        {
            **function.__globals__,
            kernel_name: _CompilingKernel(getattr(module, kernel_name), add_variant),
        },
        function.__name__,
        function.__defaults__,
    )
    inference_mode: Any = torch.inference_mode()
    compiling_copy: Callable[..., None] = inference_mode(copy)
    return compiling_copy


@dataclass(frozen=True)
class _CompilingKernel:
    """Takes the place of a kernel. vLLM launches a kernel by ``kernel[grid](...)``. This object
    compiles instead.
    """

    kernel: Any
    add_variant: Callable[[Any], None]

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def compile_variant(*arguments: Any, **options: Any) -> None:
            self.add_variant(self.kernel.warmup(*arguments, grid=grid, **options))

        return compile_variant


def _call(
    shrink: Callable[..., None],
    expand: Callable[..., None],
    shape: LayerShape,
    tokens: int,
    slots: LoraSlots,
) -> None:
    """Call the two functions for one layer and ``tokens`` tokens, with the arguments of vLLM's
    ``PunicaWrapperGPU.add_lora_linear``.
    """
    from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta  # noqa: PLC0415

    # vLLM recognizes a tensor by its address, and later tensors may have the same address.
    clear_pointer_cache()
    metadata = LoRAKernelMeta.make(slots.max_loras, tokens, device="cpu")
    metadata.prepare_tensors(torch.zeros(tokens, dtype=torch.int32, device="cpu"))
    arguments = metadata.meta_args(tokens, False)
    # While a model is loaded, torch's default dtype is another one. So each dtype is given.
    empty = partial(torch.empty, device="cpu")
    weights = partial(empty, dtype=slots.dtype)
    x = weights(tokens, shape.in_features)
    hidden = empty(shape.slices, tokens, shape.rank, dtype=torch.float32)
    out = weights(tokens, sum(shape.rows))
    a = [weights(slots.max_loras, 1, shape.rank, shape.in_features) for _ in shape.rows]
    b = [weights(slots.max_loras, 1, rows, shape.rank) for rows in shape.rows]
    shrink(x, a, hidden, *arguments, 1.0)
    expand(hidden, b, out, *arguments, offset_start=0, add_inputs=True)


def clear_pointer_cache() -> None:
    """Clear the LoRA kernels' cache of weight addresses.

    The kernels cache addresses, strides and offsets for the whole process, and look them up by the
    address of the first byte (``lora/ops/triton_ops/utils.py``, 0.25.1 and 0.31.0). Another engine
    may have tensors of other shapes at the same address, so the cached values would be wrong.
    """
    # The module is not imported here. If it is not loaded, no kernel has run and no cache exists.
    kernels = sys.modules.get("vllm.lora.ops.triton_ops.utils")
    if kernels is not None:
        kernels._LORA_A_PTR_DICT.clear()
        kernels._LORA_B_PTR_DICT.clear()
