"""Adapted layers under bfloat16 autocast: their errors are not larger than those of PEFT's layers,
and autograd saves less memory.
"""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import nn

from toolkit.policy.lora_layer import LoraLinear, use_fast_layers

INS, OUTS, RANK, ALPHA = 96, 160, 8, 24


class ThreeLayerModel(nn.Module):
    """Two layers with the same input, like q and k, and a layer after them. One layer has a
    bias.
    """

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(INS, OUTS)
        self.right = nn.Linear(INS, OUTS, bias=False)
        self.last = nn.Linear(OUTS, INS, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(self.left(x) * torch.sigmoid(self.right(x)))
        return out


def make_adapted_model(dtype: torch.dtype, *, fast: bool, **settings: Any) -> Any:
    torch.manual_seed(3)
    base = ThreeLayerModel().to(dtype)
    values = {"r": RANK, "lora_alpha": ALPHA, "init_lora_weights": False}
    config = peft.LoraConfig(**{"target_modules": ["left", "right", "last"], **values, **settings})
    torch.manual_seed(4)
    return peft.get_peft_model(base, use_fast_layers(config) if fast else config)


def outputs_and_gradients(model: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and gradients, in float32."""
    x = x.clone().requires_grad_()
    uses_autocast = x.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=uses_autocast):
        out = model(x)
    (out.float() ** 2).mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach().float(), "x": x.grad.float(), **gradients}


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(5)
    return torch.randn(3, 7, INS, dtype=torch.bfloat16)


def float64_results(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The results of PEFT's own layers with the same weights in float64."""
    model = make_adapted_model(torch.bfloat16, fast=False).double()
    return {name: value.float() for name, value in outputs_and_gradients(model, x.double()).items()}


def relative_errors(
    results: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> dict[str, float]:
    assert results.keys() == expected.keys()
    return {
        name: float((results[name] - expected[name]).norm() / expected[name].norm())
        for name in expected
    }


def test_errors_are_not_larger_than_those_of_peft(x: torch.Tensor) -> None:
    expected = float64_results(x)
    errors = relative_errors(
        outputs_and_gradients(make_adapted_model(torch.bfloat16, fast=True), x), expected
    )
    peft_errors = relative_errors(
        outputs_and_gradients(make_adapted_model(torch.bfloat16, fast=False), x), expected
    )
    assert len(errors) == 2 + 6
    for name, value in errors.items():
        assert value < max(1.2 * peft_errors[name], 0.004), name


def test_only_the_adapter_has_gradients_in_its_own_dtype(x: torch.Tensor) -> None:
    model = make_adapted_model(torch.bfloat16, fast=True)
    outputs_and_gradients(model, x)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name)
        if parameter.grad is not None:
            assert parameter.grad.dtype == parameter.dtype == torch.float32


def saved_bytes(model: Any, x: torch.Tensor) -> int:
    """Bytes that autograd saves for the backward pass, without the parameters."""
    storages: dict[int, int] = {}

    def record_storage(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(record_storage, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
        for parameter in model.parameters():
            storages.pop(parameter.untyped_storage().data_ptr(), None)
    del out
    return sum(storages.values())


def test_the_input_is_saved_only_once(x: torch.Tensor) -> None:
    bytes_saved, peft_bytes_saved = (
        saved_bytes(make_adapted_model(torch.bfloat16, fast=fast), x) for fast in (True, False)
    )
    rows = x.shape[0] * x.shape[1]
    # The layers left and right share one saved input. PEFT saves a copy for each of them, and the
    # adapter's casts.
    assert bytes_saved <= peft_bytes_saved - rows * INS * x.element_size()


@pytest.mark.parametrize(
    "settings",
    [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True, "target_modules": ["left"]}],
    ids=["dropout", "dora", "bias"],
)
def test_variants_of_lora_use_pefts_forward_pass(settings: dict[str, Any], x: torch.Tensor) -> None:
    outputs = []
    for fast in (True, False):
        model = make_adapted_model(torch.bfloat16, fast=fast, **settings)
        torch.manual_seed(6)
        outputs.append(outputs_and_gradients(model, x))
    for name, value in outputs[0].items():
        assert torch.equal(value, outputs[1][name]), name


def test_float32_results_equal_those_of_peft(x: torch.Tensor) -> None:
    results, peft_results = (
        outputs_and_gradients(make_adapted_model(torch.float32, fast=fast), x.float())
        for fast in (True, False)
    )
    assert all(torch.equal(results[name], peft_results[name]) for name in peft_results)


def test_disabled_and_merged_adapters_compute_like_peft(x: torch.Tensor) -> None:
    model, plain = (
        make_adapted_model(torch.bfloat16, fast=True),
        make_adapted_model(torch.bfloat16, fast=False),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        with model.disable_adapter(), plain.disable_adapter():
            assert torch.equal(model(x), plain(x))
        model.merge_adapter()
        plain.merge_adapter()
        assert torch.equal(model(x), plain(x))


def test_subclasses_of_linear_get_pefts_layer() -> None:
    class Special(nn.Linear):
        pass

    base = nn.Sequential(Special(INS, INS), nn.Linear(INS, INS))
    config = use_fast_layers(peft.LoraConfig(target_modules=["0", "1"]))
    model = peft.get_peft_model(base, config)
    kinds = [type(layer) for layer in model.base_model.model]
    assert kinds == [peft.tuners.lora.Linear, LoraLinear]
