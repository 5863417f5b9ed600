"""Sharing of 4-bit weights without bitsandbytes: shapes, offsets and quantization states. tests/gpu
tests it with bitsandbytes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from toolkit.base.errors import MissingExtraError, UnsupportedError
from toolkit.engine import live_weights
from toolkit.policy import bnb_layers
from toolkit.policy.weight_names import Slice


class FakeQuantState:
    """The fields of ``bitsandbytes.functional.QuantState`` that the toolkit reads."""

    def __init__(self, absmax: torch.Tensor, shape: Any, **others: Any) -> None:
        self.absmax, self.shape, self.nested = (
            absmax,
            torch.Size(shape),
            others.pop("nested", False),
        )
        self.code, self.blocksize = others.pop("code", None), others.pop("blocksize", 64)
        self.quant_type, self.dtype = (
            others.pop("quant_type", "nf4"),
            others.pop("dtype", torch.bfloat16),
        )
        assert not others


def make_packed_weight(*rows: int, columns: int = 64, **state_values: Any) -> torch.Tensor:
    """The packed weight of a fused layer in vLLM: (n, 1) bytes, offsets in bytes, and one state per
    part.
    """
    sizes = [row * columns // 2 for row in rows]
    tensor = torch.nn.Parameter(
        torch.arange(sum(sizes)).to(torch.uint8)[:, None], requires_grad=False
    )
    states = {
        i: FakeQuantState(
            torch.full((row * columns // 64,), float(i)), (row, columns), **state_values
        )
        for i, row in enumerate(rows)
    }
    tensor.bnb_quant_state = dict(reversed(states.items()))
    tensor.bnb_shard_offsets = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()])
    return tensor


def test_logical_shape_of_a_packed_weight() -> None:
    assert live_weights.logical_shape(make_packed_weight(8, 2, 2)) == (12, 64)
    assert live_weights.logical_shape(torch.empty(3, 5)) == (3, 5)
    assert not live_weights.is_packed(torch.empty(3, 5))


def test_find_parts_returns_only_complete_parts() -> None:
    assert bnb_layers.find_parts([8, 2, 2], 8, 2) == range(1, 2)
    assert bnb_layers.find_parts([8, 2, 2], 8, 4) == range(1, 3)
    with pytest.raises(UnsupportedError, match="do not match the 4-bit parts"):
        bnb_layers.find_parts([8, 2, 2], 9, 2)


def test_the_4bit_layer_gets_a_view_and_its_state(monkeypatch: pytest.MonkeyPatch) -> None:
    created_from: list[tuple[torch.Tensor, Any]] = []

    def record_arguments(data: torch.Tensor, state: Any) -> torch.nn.Module:
        created_from.append((data, state))
        return torch.nn.Identity()

    monkeypatch.setattr(bnb_layers, "make_linear_4bit", record_arguments)
    model = torch.nn.ModuleDict({"v": torch.nn.Linear(64, 2)})
    bias = model["v"].bias
    source = make_packed_weight(8, 2, 2)
    bnb_layers.replace_by_linear_4bit(model, "v", source, Slice("qkv", 10, 2))
    (data, state) = created_from[0]
    assert data.data_ptr() == source.data_ptr() + 10 * 32
    assert data.shape == (64, 1)
    assert state is source.bnb_quant_state[2]
    assert model["v"].bias is bias
    with pytest.raises(UnsupportedError, match="Embedding, not a linear"):
        bnb_layers.replace_by_linear_4bit(
            torch.nn.ModuleDict({"v": torch.nn.Embedding(2, 2)}), "v", source, Slice("qkv", 0, 8)
        )


def test_states_of_adjacent_parts_are_joined() -> None:
    source = make_packed_weight(8, 4)
    joined = bnb_layers.join_quant_states(live_weights.ordered_states(source), "gate_up_proj")
    assert tuple(joined.shape) == (12, 64)
    assert joined.absmax.tolist() == [0.0] * 8 + [1.0] * 4


def test_states_with_other_settings_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="double quantization"):
        bnb_layers.join_quant_states(
            live_weights.ordered_states(make_packed_weight(8, nested=True)), "x"
        )
    a, b = make_packed_weight(8), make_packed_weight(8, blocksize=128)
    with pytest.raises(UnsupportedError, match="different quantization"):
        bnb_layers.join_quant_states(
            [*live_weights.ordered_states(a), *live_weights.ordered_states(b)], "x"
        )


def test_without_bitsandbytes_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    state = live_weights.ordered_states(make_packed_weight(8))[0]
    with pytest.raises(MissingExtraError, match="bitsandbytes") as caught:
        bnb_layers.make_linear_4bit(torch.zeros(256, 1, dtype=torch.uint8), state)
    assert "grpo-toolkit[cuda]" in str(caught.value.fix)


def test_the_model_is_marked_as_4bit() -> None:
    model = torch.nn.Linear(2, 2)
    bnb_layers.mark_4bit(model)
    assert model.is_loaded_in_4bit is True
