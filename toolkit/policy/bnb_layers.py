"""Build the trainer's 4-bit layers. Their weights are the engine's packed weights, not copies.

The engine fuses layers such as q, k and v. Each part of a fused layer is a complete 4-bit weight
with its own quantization state (``engine.live_weights.is_packed``). So a ``Linear4bit`` layer
(bitsandbytes 0.50.2) that refers to this part of the packed tensor computes the same as the engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from toolkit.base.errors import MissingExtraError, UnsupportedError
from toolkit.engine.live_weights import OFFSETS_ATTRIBUTE, ordered_states
from toolkit.policy.weight_names import FALLBACK_ADVICE, SHARE_WEIGHTS_KEY

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from toolkit.policy.weight_names import Slice


def find_parts(rows: Sequence[int], start: int, count: int) -> range:
    """Return the indices of the 4-bit parts that together contain exactly the rows from ``start``
    to ``start + count`` of a fused layer. ``rows`` has the number of rows of each part.

    Raises:
        UnsupportedError: the rows begin or end inside a part.
    """
    edges = [0]
    for part_rows in rows:
        edges.append(edges[-1] + part_rows)
    if start not in edges or start + count not in edges:
        raise UnsupportedError(
            f"rows {start} to {start + count} do not match the 4-bit parts, which begin and end at "
            f"the rows {edges}",
            where=SHARE_WEIGHTS_KEY,
            fix=FALLBACK_ADVICE,
        )
    return range(edges.index(start), edges.index(start + count))


def replace_by_linear_4bit(model: nn.Module, path: str, tensor: torch.Tensor, rows: Slice) -> None:
    """Replace the linear layer named ``path`` by a 4-bit layer. The weight of the new layer is
    ``rows``, a range of rows of the engine's packed ``tensor``. The weight is not copied.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
        UnsupportedError: the layer is not a plain linear layer, the rows begin or end inside one of
            the 4-bit parts of the fused layer, or ``join_quant_states`` cannot join the
            quantization states of these parts.
    """
    old = model.get_submodule(path)
    if type(old) is not torch.nn.Linear:
        raise UnsupportedError(
            f"{path} is a {type(old).__name__}, not a linear layer",
            where=SHARE_WEIGHTS_KEY,
            fix=FALLBACK_ADVICE,
        )
    states = ordered_states(tensor)
    part_indices = find_parts([int(state.shape[0]) for state in states], rows.start, rows.rows)
    offsets = [int(offset) for offset in getattr(tensor, OFFSETS_ATTRIBUTE)]
    packed = tensor.data[offsets[part_indices.start] : offsets[part_indices.stop]]
    state = join_quant_states([states[index] for index in part_indices], path)
    layer = make_linear_4bit(packed, state)
    layer.train(old.training)
    if old.bias is not None:
        # Keep the bias parameter of the old layer. Like every other parameter, it is later bound to
        # the engine's tensor.
        layer.register_parameter("bias", old.bias)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)


def join_quant_states(states: Sequence[Any], where: str) -> Any:
    """Return one quantization state for adjacent 4-bit parts of a fused layer, from the ``states``
    of these parts. The state of a single part is returned unchanged. For several parts the result
    is a new state with the absmax values (scales) of all parts, in order.

    Raises:
        UnsupportedError: the absmax values of a state are themselves quantized (nested), or the
            parts have different quantization settings.
    """
    first = states[0]
    if any(state.nested for state in states):
        raise UnsupportedError(
            (f"{where}: quantized scales (double quantization) are not supported"),
            where=SHARE_WEIGHTS_KEY,
            fix=FALLBACK_ADVICE,
        )
    if len(states) == 1:
        return first
    settings = {
        (state.blocksize, state.quant_type, state.dtype, tuple(state.shape[1:])) for state in states
    }
    sizes = [state.shape[0] * state.shape[1] for state in states]
    if len(settings) != 1 or any(size % first.blocksize for size in sizes):
        raise UnsupportedError(
            (f"{where}: the parts of the layer have different quantization settings"),
            where=SHARE_WEIGHTS_KEY,
            fix=FALLBACK_ADVICE,
        )
    return type(first)(
        absmax=torch.cat([state.absmax for state in states]),
        shape=torch.Size((sum(state.shape[0] for state in states), *first.shape[1:])),
        code=first.code,
        blocksize=first.blocksize,
        quant_type=first.quant_type,
        dtype=first.dtype,
    )


def make_linear_4bit(packed: torch.Tensor, state: Any) -> nn.Module:
    """Create a frozen ``bitsandbytes.nn.Linear4bit`` with the weight ``packed`` (n, 1) uint8, which
    is not copied.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
    """
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit  # noqa: PLC0415 - only for 4-bit
    except ImportError as problem:
        raise MissingExtraError(
            "load_in_4bit needs bitsandbytes, which is not installed",
            where="model.load_in_4bit",
            fix="run `pip install 'grpo-toolkit[cuda]'`",
        ) from problem
    rows, columns = (int(size) for size in state.shape)
    layer: nn.Module = Linear4bit(
        columns,
        rows,
        bias=False,
        compute_dtype=torch.bfloat16,  # vLLM computes all 4-bit layers in this dtype
        compress_statistics=False,
        quant_type=state.quant_type,
        device="meta",
    )
    layer.weight = Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=False,
        quant_type=state.quant_type,
        quant_storage=packed.dtype,
        module=layer,
        bnb_quantized=True,
    )
    layer.quant_state = state
    return layer


class PackedLinear4bit(NamedTuple):
    """Wraps a frozen ``Linear4bit`` as the base layer of an adapted layer. Implements
    ``adapted_linear.PackedBase``.
    """

    layer: Any

    def matmul(self, x_TI: torch.Tensor) -> torch.Tensor:
        """Return the output (T, O) of the ``Linear4bit`` layer, in the dtype of ``x_TI``."""
        from bitsandbytes import matmul_4bit  # noqa: PLC0415 - only for 4-bit

        weight, bias = self.layer.weight, self.layer.bias
        bias = None if bias is None else bias.to(x_TI.dtype)
        out: torch.Tensor = matmul_4bit(x_TI, weight, bias=bias, quant_state=weight.quant_state)
        return out

    def unpacked_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the unpacked weight (O, I) in ``dtype``."""
        from bitsandbytes.functional import dequantize_4bit  # noqa: PLC0415 - only for 4-bit

        weight = self.layer.weight
        weight_OI: torch.Tensor = dequantize_4bit(weight.data.view(-1, 1), weight.quant_state)
        return weight_OI.to(dtype)


def compute_dtype_4bit(layer: Any) -> torch.dtype | None:
    """Return the dtype in which a ``Linear4bit`` layer computes. Returns None for other layers, and
    for a layer whose weight is not packed yet.
    """
    state = getattr(getattr(layer, "weight", None), "quant_state", None)
    if type(layer).__name__ != "Linear4bit" or state is None:
        return None
    dtype: torch.dtype | None = layer.compute_dtype
    return dtype


def mark_4bit(model: nn.Module) -> None:
    """Set the attribute of ``model`` that tells PEFT and TRL that the model has 4-bit layers."""
    # nn.Module declares every attribute as a tensor or a module.
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
