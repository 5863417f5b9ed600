"""Keep 16-bit copies of the engine's 4-bit weights during a rollout, so that decode steps are
faster.

bitsandbytes dequantizes every weight at every decode step, although the weights do not change
during a rollout. This module dequantizes the weights once, at the beginning of a rollout. The
decode steps are then plain matrix products with the copies. The values of the copies are those that
the 4-bit layer computes with (``dequantize_4bit`` of the same codes, in bfloat16). The trainer
keeps using the 4-bit weights.

At the end of the rollout the memory of the copies is released. Their addresses stay reserved, so
captured CUDA graphs stay valid. The next rollout fills the copies again.

The attribute ``quant_method`` of a layer is the quantization method that vLLM's linear layers and
their LoRA wrappers call. ``DequantizedMethod`` replaces it. Written for vLLM 0.25.1 and
bitsandbytes 0.50.2.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase

from toolkit.base.errors import ConfigError, ToolkitWarning
from toolkit.base.formatting import format_bytes
from toolkit.engine import sleep
from toolkit.engine.live_weights import OFFSETS_ATTRIBUTE, is_packed, logical_shape, ordered_states

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    Unpack = Callable[[torch.Tensor, Any, torch.Tensor], None]

MEMORY_TAG = "toolkit_dequantized"
COPIES_ATTRIBUTE = "_toolkit_dequantized"
"""The name of the model attribute in which ``attach_copies`` stores the ``DequantizedCopies``
object.
"""
COMPUTE_DTYPE = torch.bfloat16
"""The dtype in which vLLM computes 4-bit layers, for every dtype of the activations."""
MAX_AUTO_SHARE = 0.5
MIN_UNUSED_BYTES = 3 << 30
"""Limits of the copies for ``dequantized_rollouts: auto`` if the toolkit's memory estimate did not
choose their size. ``MAX_AUTO_SHARE`` is the largest share of the engine's memory (without weights)
that the copies may take. ``MIN_UNUSED_BYTES`` are the bytes that must stay free for the KV cache
and the activations.
"""


def unpack_4bit(packed: torch.Tensor, state: Any, out: torch.Tensor) -> None:
    """Dequantize ``packed`` (n, 1) uint8 into ``out`` (rows, columns). The values are rounded as
    bitsandbytes rounds them before a matrix product.
    """
    from bitsandbytes.functional import dequantize_4bit  # noqa: PLC0415 - only for 4-bit

    if state.dtype == out.dtype:
        dequantize_4bit(packed, state, out=out)
    else:
        out.copy_(dequantize_4bit(packed, state))


class DequantizedCopies:
    """The 16-bit copies of some layers of one model. The method ``weight`` fills the copies if they
    are empty.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        *,
        unpack: Unpack = unpack_4bit,
        dtype: torch.dtype = COMPUTE_DTYPE,
    ) -> None:
        self._packed_weights = [_weight_of(layer) for layer in layers]
        self._unpack, self._dtype = unpack, dtype
        self._copies: list[torch.Tensor] = []
        self.is_filled = False

    @property
    def nbytes(self) -> int:
        """The number of bytes of all 16-bit copies when they are filled."""
        return sum(copy_bytes(packed, self._dtype) for packed in self._packed_weights)

    def check_fits(self) -> None:
        """Raise an error if the 16-bit copies do not fit into the free GPU memory.

        Raises:
            ConfigError: the copies do not fit. The message contains their size and the free memory.
        """
        free = torch.cuda.mem_get_info()[0] if self._is_on_gpu else self.nbytes
        if self.nbytes > free:
            raise ConfigError(
                f"the 16-bit copies of the 4-bit weights need {format_bytes(self.nbytes)}, but "
                f"only {format_bytes(free)} of GPU memory is free",
                where="model.dequantized_rollouts",
                fix=f"set `dequantized_rollouts` to `auto`, to `false`, or to at most {free} bytes",
            )

    def weight(self, index: int) -> torch.Tensor:
        """Return the 16-bit copy of the weight of layer ``index``, of shape (out, in)."""
        if not self.is_filled:
            self.fill()
        return self._copies[index]

    @torch.no_grad()
    def fill(self) -> None:
        """Allocate memory for the 16-bit copies and dequantize the weights into it. Does nothing if
        the copies are filled.

        Raises:
            RuntimeError: there is not enough memory. The memory that was allocated is released.
        """
        if self.is_filled:
            return
        try:
            if self._copies:
                self._remap()
            else:
                self._allocate()
            for packed, copy in zip(self._packed_weights, self._copies, strict=True):
                self._unpack_layer(packed, copy)
        except BaseException:
            self.release()
            raise
        self.is_filled = True

    def release(self) -> None:
        """Release the memory of the 16-bit copies. On a GPU their addresses stay reserved. A second
        call does nothing.
        """
        self.is_filled = False
        if not self._copies:
            return
        if self._is_on_gpu:
            sleep.release_tag(MEMORY_TAG)
        else:
            for copy in self._copies:
                copy.untyped_storage().resize_(0)

    def close(self) -> None:
        """Release the memory and the addresses of the 16-bit copies. The copies cannot be used
        again.
        """
        if self._is_on_gpu and self._copies:
            sleep.map_tag(MEMORY_TAG)  # only mapped memory can be freed
            self._copies.clear()
            sleep.free_pool(MEMORY_TAG)
        self._copies.clear()
        self._packed_weights.clear()
        self.is_filled = False

    @property
    def _is_on_gpu(self) -> bool:
        return any(packed.is_cuda for packed in self._packed_weights)

    def _allocate(self) -> None:
        copies: list[torch.Tensor] = []
        pool = sleep.tagged_pool(MEMORY_TAG) if self._is_on_gpu else nullcontext()
        # The first forward pass calls this function in inference mode. Tensors that are created in
        # that mode cannot be written outside it, so the mode is switched off.
        with torch.inference_mode(False), pool:
            for packed in self._packed_weights:
                shape = logical_shape(packed)
                copies.append(torch.empty(shape, dtype=self._dtype, device=packed.device))
        self._copies = copies

    def _remap(self) -> None:
        if self._is_on_gpu:
            sleep.map_tag(MEMORY_TAG)
            return
        for copy in self._copies:
            copy.untyped_storage().resize_(copy.numel() * copy.element_size())

    def _unpack_layer(self, packed: torch.Tensor, copy: torch.Tensor) -> None:
        """Dequantize the 4-bit weight of one layer into ``copy``. In a fused layer the rows of its
        parts follow each other, and each part has its own quantization state.
        """
        offsets = [int(offset) for offset in getattr(packed, OFFSETS_ATTRIBUTE)]
        row = 0
        for part, state in enumerate(ordered_states(packed)):
            rows = int(state.shape[0])
            codes = packed.data[offsets[part] : offsets[part + 1]]
            self._unpack(codes, state, copy[row : row + rows])
            row += rows


class DequantizedMethod(LinearMethodBase):  # type: ignore[misc]  # vllm ships no types
    """The quantization method of a layer with a 16-bit copy. It multiplies the input of the layer
    by the copy.
    """

    def __init__(self, original: Any, copies: DequantizedCopies, index: int) -> None:
        self.original, self.copies, self.index = original, copies, index

    def create_weights(self, *arguments: Any, **keywords: Any) -> None:
        """Create the 4-bit weights with the layer's original quantization method, which this
        object replaces.
        """
        self.original.create_weights(*arguments, **keywords)

    def apply(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Multiply ``x`` (..., in) by the 16-bit copy of the weight. Returns (..., out) in the
        dtype of ``x``.
        """
        del layer
        weight = self.copies.weight(self.index)
        out = functional.linear(x.to(weight.dtype), weight).to(x.dtype)
        return out if bias is None else out + bias


def _weight_of(layer: nn.Module) -> torch.Tensor:
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)  # nn.Module declares a tensor or a module
    return weight


def copy_bytes(packed: torch.Tensor, dtype: torch.dtype = COMPUTE_DTYPE) -> int:
    """Return the number of bytes that the 16-bit copy of a packed weight takes."""
    rows, columns = logical_shape(packed)
    return rows * columns * dtype.itemsize


def find_4bit_layers(model: nn.Module) -> list[nn.Module]:
    """Return the linear layers whose weights are packed in 4 bits, in the order of the model."""
    layers: list[nn.Module] = []
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, LinearBase) and weight is not None and is_packed(weight):
            layers.append(module)
    return layers


def choose_largest_layers(layers: Sequence[nn.Module], max_bytes: int) -> list[nn.Module]:
    """Return the layers that get a 16-bit copy. Layers are chosen in the order of size, the largest
    first, so that all copies together take at most ``max_bytes`` bytes.

    A layer whose copy does not fit into the remaining bytes is skipped. Layers of equal size keep
    the order of the model.
    """
    chosen = []
    for layer in sorted(layers, key=lambda one: -copy_bytes(_weight_of(one))):
        size = copy_bytes(_weight_of(layer))
        if size <= max_bytes:
            chosen.append(layer)
            max_bytes -= size
    return chosen


def attach_copies(
    model: nn.Module,
    requested: bool | int,
    *,
    unpack: Unpack = unpack_4bit,
    dtype: torch.dtype = COMPUTE_DTYPE,
) -> DequantizedCopies | None:
    """Make 4-bit layers of ``model`` compute with 16-bit copies of their weights. Returns the
    copies, or None if no layer gets a copy.

    If ``requested`` is True, all 4-bit layers get a copy. If ``requested`` is a number of bytes,
    the copies of the largest layers are chosen until they take this number of bytes together. Call
    this function after vLLM has loaded the model and before the first forward pass. The first
    forward pass fills the copies. vLLM captures its CUDA graphs after the first forward pass.
    """
    layers = find_4bit_layers(model)
    chosen = layers if requested is True else choose_largest_layers(layers, int(requested))
    if not chosen:
        return None
    copies = DequantizedCopies(chosen, unpack=unpack, dtype=dtype)
    for index, layer in enumerate(chosen):
        layer.quant_method = DequantizedMethod(layer.quant_method, copies, index)
    setattr(model, COPIES_ATTRIBUTE, copies)
    return copies


def choose_copy_bytes(model: nn.Module, vllm_config: Any) -> int:
    """Return the total bytes of the 16-bit copies for ``dequantized_rollouts: auto``. Warns if
    there is not enough memory for copies of all layers.

    For a run file this function is not called, because the toolkit's memory estimate chooses the
    bytes before the engine starts. If some layers get no copy, the estimate has a note about it.
    """
    available_bytes, layers = available_copy_bytes(model, vllm_config), find_4bit_layers(model)
    needed_bytes = sum(copy_bytes(_weight_of(layer)) for layer in layers)
    chosen_bytes = sum(
        copy_bytes(_weight_of(layer)) for layer in choose_largest_layers(layers, available_bytes)
    )
    if chosen_bytes < needed_bytes:
        outcome = (
            f"copies of only {format_bytes(chosen_bytes)} are made"
            if chosen_bytes
            else "no copies are made"
        )
        warnings.warn(
            f"the 16-bit copies of the 4-bit weights would take {format_bytes(needed_bytes)}, but "
            f"the weights and the KV cache leave only {format_bytes(available_bytes)} for the "
            f"copies. So {outcome} (model.dequantized_rollouts: auto), and decode steps are "
            "slower. A higher gpu_memory_utilization leaves more memory for the copies",
            ToolkitWarning,
            stacklevel=2,
        )
    return chosen_bytes


def available_copy_bytes(model: nn.Module, vllm_config: Any) -> int:
    """Return how many bytes of GPU memory the 16-bit copies may take.

    If the size of the KV cache is configured, the available memory is the free memory minus the KV
    cache. If the size is not configured, the available memory is the engine's share of the total
    memory (``gpu_memory_utilization``) minus the weights, but at most the free memory. The copies
    may take the share ``MAX_AUTO_SHARE`` of the available memory, and must leave
    ``MIN_UNUSED_BYTES`` of it unused.
    """
    cache = vllm_config.cache_config
    free, total = torch.cuda.mem_get_info()
    weight_bytes = sum(tensor.nbytes for tensor in model.parameters())
    kv_cache_bytes = getattr(cache, "kv_cache_memory_bytes", None)
    available_bytes = (
        free - kv_cache_bytes
        if kv_cache_bytes
        else int(cache.gpu_memory_utilization * total) - weight_bytes
    )
    available_bytes = min(available_bytes, free)
    return max(0, min(int(available_bytes * MAX_AUTO_SHARE), available_bytes - MIN_UNUSED_BYTES))
