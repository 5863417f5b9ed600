"""Compile vLLM's LoRA kernels in several threads while the engine reads the weights.

Without a cache, Triton compiles a variant of a kernel when the variant is first launched. The start
and the first steps of a run need about 35 variants of vLLM's two LoRA kernels, which take 15 s to
compile one after the other (8B model, H200). This module compiles them together, with Triton's
``AsyncCompileMode`` (Triton 3.6).

vLLM's own functions decide which variants exist. The functions are copied, and called with empty
tensors in host memory. In the copies, an object that compiles but does not launch takes the place
of the kernel. So nothing is computed, and no GPU memory is used (vLLM 0.25.1 and 0.31.0).
"""

from __future__ import annotations

import inspect
import os
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.linear import LinearBase

from toolkit.engine.lora_tables import PREFILL_BATCH_SIZES, TUNED_BATCH_SIZES, LayerShape
from toolkit.engine.vllm_internals import clear_pointer_cache, device_type

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import nn
    from vllm.config import VllmConfig

MAX_THREADS = 8


@contextmanager
def compiled_lora_kernels(model: nn.Module, vllm_config: VllmConfig) -> Iterator[None]:
    """A context manager that compiles the LoRA kernels for ``model`` in other threads while its
    body runs. At the end of the body it waits for them. Without LoRA or CUDA it does nothing.

    Use it while no LoRA kernel is launched. If a kernel does not compile, no error is raised here.
    The kernel is compiled again when it is first launched.
    """
    lora_config = vllm_config.lora_config
    if lora_config is None or device_type() != "cuda":
        yield
        return
    shapes = lora_shapes(model, lora_config.target_modules, lora_config.max_lora_rank)
    sizes = batch_sizes(
        vllm_config.compilation_config.cudagraph_capture_sizes or (),
        vllm_config.scheduler_config.max_num_batched_tokens,
    )
    work = partial(compile_kernels, shapes, sizes, lora_config.max_loras, lora_config.lora_dtype)
    # A new thread uses device 0 until it chooses another one.
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    thread = threading.Thread(target=_run_on_device, args=(device, work), name="lora-compile")
    thread.start()
    try:
        yield
    finally:
        thread.join()


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


def batch_sizes(graph_sizes: Iterable[int], max_tokens: int) -> list[int]:
    """Return batch sizes (in tokens) that need every variant of the kernels. ``graph_sizes`` are
    the sizes of captured decode steps. ``max_tokens`` is the largest batch.

    Triton makes one variant for the sizes that 16 divides, and another one for the other sizes. So
    each size of a table is included together with the next size.
    """
    table_sizes = [*TUNED_BATCH_SIZES, *PREFILL_BATCH_SIZES]
    sizes = {*graph_sizes, *table_sizes, *(size + 1 for size in table_sizes), max_tokens}
    return sorted(size for size in sizes if size <= max_tokens)


def compile_kernels(
    shapes: Iterable[LayerShape], sizes: Sequence[int], max_loras: int, dtype: torch.dtype
) -> None:
    """Compile the variants of both LoRA kernels for layers with ``shapes`` and batches of ``sizes``
    tokens. ``max_loras`` is the number of LoRA slots, and ``dtype`` is their dtype.
    """
    from triton import AsyncCompileMode  # noqa: PLC0415 - only installed with CUDA

    shrink = _CompilingCopy("lora_shrink_op", "_lora_shrink")
    expand = _CompilingCopy("lora_expand_op", "_lora_expand")
    try:
        with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
            with AsyncCompileMode(pool, ignore_errors=True):
                for shape in shapes:
                    for tokens in sizes:
                        _call(shrink, expand, shape, tokens, max_loras, dtype)
            for kernel in (*shrink.one_per_launcher(), *expand.one_per_launcher()):
                pool.submit(_build_launcher, kernel)
    finally:
        clear_pointer_cache()


def _run_on_device(device: int | None, work: Callable[[], None]) -> None:
    try:
        with nullcontext() if device is None else torch.cuda.device(device):
            work()
    except Exception:  # noqa: BLE001 - a kernel that is not compiled here is compiled at its launch
        return


class _CompilingCopy:
    """A copy of vLLM's function that launches a LoRA kernel. The copy compiles the variant of the
    kernel that its arguments need, and does not launch it.
    """

    def __init__(self, module_name: str, function_name: str) -> None:
        module = import_module(f"vllm.lora.ops.triton_ops.{module_name}")
        function: Any = inspect.unwrap(getattr(module, function_name))
        kernel_name = f"{function_name}_kernel"
        self._kernel = getattr(module, kernel_name)
        self._variants: dict[int, Any] = {}  # Triton's object of each variant, by its identity
        copy = types.FunctionType(
            function.__code__,
            # In the copy, this object takes the place of the kernel.
            {**function.__globals__, kernel_name: self},
            function.__name__,
            function.__defaults__,
        )
        self._copy: Callable[..., None] = torch.inference_mode()(copy)

    def __call__(self, *arguments: Any, **options: Any) -> None:
        """Compile the variant that a call of vLLM's function with these arguments would launch."""
        self._copy(*arguments, **options)

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        """Return a function that compiles the kernel. vLLM calls ``kernel[grid](...)``."""

        def compile_variant(*arguments: Any, **options: Any) -> None:
            variant = self._kernel.warmup(*arguments, grid=grid, **options)
            self._variants[id(variant)] = variant

        return compile_variant

    def one_per_launcher(self) -> Iterable[Any]:
        """Return compiled kernels, one for each launcher. Kernels whose arguments have the same
        types have the same launcher.
        """
        kernels = {}
        for variant in self._variants.values():
            kernel = variant.result(ignore_errors=True) if hasattr(variant, "result") else variant
            if kernel is not None:
                kernels[str(kernel.src.signature)] = kernel
        return kernels.values()


def _build_launcher(kernel: Any) -> None:
    """Compile the C function that launches ``kernel``. Triton finds it in its cache at the first
    launch. Without this, a C compiler runs for about 0.3 s at that time.
    """
    from triton.runtime import driver  # noqa: PLC0415 - only installed with CUDA

    driver.active.launcher_cls(kernel.src, kernel.metadata)


def _call(
    shrink: Callable[..., None],
    expand: Callable[..., None],
    shape: LayerShape,
    tokens: int,
    max_loras: int,
    dtype: torch.dtype,
) -> None:
    """Call the two functions for one layer and ``tokens`` tokens, with the arguments of vLLM's
    ``PunicaWrapperGPU.add_lora_linear``.
    """
    from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta  # noqa: PLC0415

    # vLLM recognizes a tensor by its address, and later tensors may have the same address.
    clear_pointer_cache()
    metadata = LoRAKernelMeta.make(max_loras, tokens, device="cpu")
    metadata.prepare_tensors(torch.zeros(tokens, dtype=torch.int32, device="cpu"))
    arguments = metadata.meta_args(tokens, False)
    # While a model is loaded, torch's default dtype is another one. So each dtype is given.
    empty = partial(torch.empty, device="cpu")
    x = empty(tokens, shape.in_features, dtype=dtype)
    hidden = empty(shape.slices, tokens, shape.rank, dtype=torch.float32)
    out = empty(tokens, sum(shape.rows), dtype=dtype)
    a = [empty(max_loras, 1, shape.rank, shape.in_features, dtype=dtype) for _ in shape.rows]
    b = [empty(max_loras, 1, rows, shape.rank, dtype=dtype) for rows in shape.rows]
    shrink(x, a, hidden, *arguments, 1.0)
    expand(hidden, b, out, *arguments, offset_start=0, add_inputs=True)
