"""Adapted 4-bit layers: PEFT's numbers to rounding, no unpacked weight kept."""

from __future__ import annotations

from typing import Any, NamedTuple

import peft
import pytest
import torch
from torch import nn

from toolkit.policy.adapted_linear import adapted_linear, adapted_packed
from toolkit.policy.lora_layer import FastForward, use_fast_layers


class Plain(NamedTuple):
    """A base that hands its weight out as a packed one does."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)

    def unpacked_weight(self, dtype: torch.dtype) -> torch.Tensor:
        return self.weight.to(dtype).clone()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_base_gives_what_its_weight_gives(bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    weight, shift = torch.randn(24, 16, dtype=dtype), torch.randn(24, dtype=dtype)
    a, b = torch.randn(4, 16, requires_grad=True), torch.randn(24, 4, requires_grad=True)
    x = torch.randn(2, 5, 16, dtype=dtype, requires_grad=True)
    offset = shift if bias else None
    plain = adapted_linear(x, weight, offset, a, b, 0.5)
    packed = adapted_packed(x, Plain(weight, offset), a, b, 0.5)
    assert torch.equal(plain, packed)
    grad = torch.randn_like(plain)
    theirs = torch.autograd.grad(plain, [x, a, b], grad)
    ours = torch.autograd.grad(packed, [x, a, b], grad)
    assert all(torch.equal(one, two) for one, two in zip(ours, theirs, strict=True))


def four_bit(fast: bool) -> Any:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="comes with the cuda extra")
    torch.manual_seed(3)
    base = nn.Sequential()
    for name, bias in (("first", True), ("second", False)):
        made = nn.Linear(64, 64, bias=bias)
        layer = bitsandbytes.nn.Linear4bit(
            64, 64, bias=bias, compute_dtype=torch.bfloat16, quant_type="nf4"
        )
        layer.load_state_dict(made.state_dict())
        base.add_module(name, layer.to("cpu").requires_grad_(False))
    base.is_loaded_in_4bit = True
    config = peft.LoraConfig(r=8, target_modules=["first", "second"], init_lora_weights=False)
    torch.manual_seed(4)
    return peft.get_peft_model(base, use_fast_layers(config) if fast else config)


def run(model: Any) -> tuple[dict[str, torch.Tensor], int]:
    """Output and gradients, and the bytes that autograd keeps beside the parameters."""
    torch.manual_seed(5)
    x = torch.randn(3, 7, 64, dtype=torch.bfloat16, requires_grad=True)
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
    (out.float() ** 2).mean().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"out": out.detach().float(), "x": x.grad.float(), **found}, sum(kept.values())


@pytest.mark.filterwarnings("ignore")  # bitsandbytes' own, about its CPU kernels
def test_four_bit_layers_give_pefts_numbers_with_less_kept() -> None:
    fast = four_bit(fast=True)
    layers = [module for module in fast.modules() if isinstance(module, FastForward)]
    assert len(layers) == 2
    (ours, kept), (theirs, usual) = run(fast), run(four_bit(fast=False))
    assert ours.keys() == theirs.keys()
    assert len(ours) == 2 + 4
    for name, value in theirs.items():
        assert (ours[name] - value).norm() < 0.01 * value.norm(), name
        assert ours[name].dtype == value.dtype
    assert kept < 0.7 * usual
