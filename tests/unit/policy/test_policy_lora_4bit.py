"""Adapted 4-bit layers: their results equal PEFT's up to rounding, and autograd saves no unpacked
weight.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import peft
import pytest
import torch
from torch import nn

from toolkit.policy.adapted_linear import adapted_linear, adapted_packed
from toolkit.policy.lora_layer import FastForward, use_fast_layers


class UnpackedBase(NamedTuple):
    """An unpacked base layer with the interface of a packed one."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)

    def unpacked_weight(self, dtype: torch.dtype) -> torch.Tensor:
        return self.weight.to(dtype).clone()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_base_computes_the_same_as_its_unpacked_weight(
    bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    weight, shift = torch.randn(24, 16, dtype=dtype), torch.randn(24, dtype=dtype)
    a, b = torch.randn(4, 16, requires_grad=True), torch.randn(24, 4, requires_grad=True)
    x = torch.randn(2, 5, 16, dtype=dtype, requires_grad=True)
    offset = shift if bias else None
    expected_output = adapted_linear(x, weight, offset, a, b, 0.5)
    packed = adapted_packed(x, UnpackedBase(weight, offset), a, b, 0.5)
    assert torch.equal(expected_output, packed)
    grad = torch.randn_like(expected_output)
    expected_gradients = torch.autograd.grad(expected_output, [x, a, b], grad)
    gradients = torch.autograd.grad(packed, [x, a, b], grad)
    assert all(
        torch.equal(gradient, expected)
        for gradient, expected in zip(gradients, expected_gradients, strict=True)
    )


def make_model_4bit(fast: bool) -> Any:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="comes with the cuda extra")
    torch.manual_seed(3)
    base = nn.Sequential()
    for name, bias in (("first", True), ("second", False)):
        full_layer = nn.Linear(64, 64, bias=bias)
        layer = bitsandbytes.nn.Linear4bit(
            64, 64, bias=bias, compute_dtype=torch.bfloat16, quant_type="nf4"
        )
        layer.load_state_dict(full_layer.state_dict())
        base.add_module(name, layer.to("cpu").requires_grad_(False))
    base.is_loaded_in_4bit = True
    config = peft.LoraConfig(r=8, target_modules=["first", "second"], init_lora_weights=False)
    torch.manual_seed(4)
    return peft.get_peft_model(base, use_fast_layers(config) if fast else config)


def forward_and_backward(model: Any) -> tuple[dict[str, torch.Tensor], int]:
    """Output and gradients, and the bytes that autograd saves in addition to the parameters."""
    torch.manual_seed(5)
    x = torch.randn(3, 7, 64, dtype=torch.bfloat16, requires_grad=True)
    saved_storage_bytes: dict[int, int] = {}
    parameter_storages = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def record_storage(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameter_storages:
            saved_storage_bytes[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(record_storage, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
    (out.float() ** 2).mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"out": out.detach().float(), "x": x.grad.float(), **gradients}, sum(
        saved_storage_bytes.values()
    )


@pytest.mark.filterwarnings("ignore")  # bitsandbytes warns about its CPU kernels
def test_4bit_layers_compute_like_peft_and_save_less_memory() -> None:
    fast = make_model_4bit(fast=True)
    layers = [module for module in fast.modules() if isinstance(module, FastForward)]
    assert len(layers) == 2
    (results, saved_bytes), (peft_results, peft_saved_bytes) = (
        forward_and_backward(fast),
        forward_and_backward(make_model_4bit(fast=False)),
    )
    assert results.keys() == peft_results.keys()
    assert len(results) == 2 + 4
    for name, value in peft_results.items():
        assert (results[name] - value).norm() < 0.01 * value.norm(), name
        assert results[name].dtype == value.dtype
    assert saved_bytes < 0.7 * peft_saved_bytes
