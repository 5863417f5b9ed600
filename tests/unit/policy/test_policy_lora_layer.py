"""Adapted layers under bfloat16 autocast: as near to float32 as PEFT's own, with less kept."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import nn

from toolkit.policy.lora_layer import LoraLinear, use_fast_layers

INS, OUTS, RANK, ALPHA = 96, 160, 8, 24


class Pair(nn.Module):
    """Two layers on one input, as q and k are, and one behind them; one with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(INS, OUTS)
        self.right = nn.Linear(INS, OUTS, bias=False)
        self.last = nn.Linear(OUTS, INS, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(self.left(x) * torch.sigmoid(self.right(x)))
        return out


def build(dtype: torch.dtype, *, fast: bool, **settings: Any) -> Any:
    torch.manual_seed(3)
    base = Pair().to(dtype)
    values = {"r": RANK, "lora_alpha": ALPHA, "init_lora_weights": False}
    config = peft.LoraConfig(**{"target_modules": ["left", "right", "last"], **values, **settings})
    torch.manual_seed(4)
    return peft.get_peft_model(base, use_fast_layers(config) if fast else config)


def run(model: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and gradients, in float32."""
    x = x.clone().requires_grad_()
    half = x.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        out = model(x)
    (out.float() ** 2).mean().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach().float(), "x": x.grad.float(), **found}


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(5)
    return torch.randn(3, 7, INS, dtype=torch.bfloat16)


def exact(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same weights in float64, by PEFT itself."""
    model = build(torch.bfloat16, fast=False).double()
    return {name: value.float() for name, value in run(model, x.double()).items()}


def off(found: dict[str, torch.Tensor], true: dict[str, torch.Tensor]) -> dict[str, float]:
    assert found.keys() == true.keys()
    return {name: float((found[name] - true[name]).norm() / true[name].norm()) for name in true}


def test_no_further_from_the_truth_than_peft(x: torch.Tensor) -> None:
    true = exact(x)
    ours = off(run(build(torch.bfloat16, fast=True), x), true)
    peft_s = off(run(build(torch.bfloat16, fast=False), x), true)
    assert len(ours) == 2 + 6
    for name, value in ours.items():
        assert value < max(1.2 * peft_s[name], 0.004), name


def test_gradients_have_the_adapters_dtype_and_the_base_has_none(x: torch.Tensor) -> None:
    model = build(torch.bfloat16, fast=True)
    run(model, x)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name)
        if parameter.grad is not None:
            assert parameter.grad.dtype == parameter.dtype == torch.float32


def saved_bytes(model: Any, x: torch.Tensor) -> int:
    """Storages that autograd keeps for the backward pass, those of parameters aside."""
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
        for parameter in model.parameters():
            storages.pop(parameter.untyped_storage().data_ptr(), None)
    del out
    return sum(storages.values())


def test_an_input_is_kept_once(x: torch.Tensor) -> None:
    ours, peft_s = (saved_bytes(build(torch.bfloat16, fast=fast), x) for fast in (True, False))
    rows = x.shape[0] * x.shape[1]
    # Left and right share theirs; those of PEFT are a copy for each, beside the adapter's casts.
    assert ours <= peft_s - rows * INS * x.element_size()


@pytest.mark.parametrize(
    "settings",
    [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True, "target_modules": ["left"]}],
    ids=["dropout", "dora", "bias"],
)
def test_what_is_not_plain_is_pefts(settings: dict[str, Any], x: torch.Tensor) -> None:
    outputs = []
    for fast in (True, False):
        model = build(torch.bfloat16, fast=fast, **settings)
        torch.manual_seed(6)
        outputs.append(run(model, x))
    for name, value in outputs[0].items():
        assert torch.equal(value, outputs[1][name]), name


def test_float32_is_pefts_bit_for_bit(x: torch.Tensor) -> None:
    ours, peft_s = (run(build(torch.float32, fast=fast), x.float()) for fast in (True, False))
    assert all(torch.equal(ours[name], peft_s[name]) for name in peft_s)


def test_switched_off_and_merged(x: torch.Tensor) -> None:
    model, plain = build(torch.bfloat16, fast=True), build(torch.bfloat16, fast=False)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        with model.disable_adapter(), plain.disable_adapter():
            assert torch.equal(model(x), plain(x))
        model.merge_adapter()
        plain.merge_adapter()
        assert torch.equal(model(x), plain(x))


def test_subclasses_of_linear_are_left_alone() -> None:
    class Special(nn.Linear):
        pass

    base = nn.Sequential(Special(INS, INS), nn.Linear(INS, INS))
    config = use_fast_layers(peft.LoraConfig(target_modules=["0", "1"]))
    model = peft.get_peft_model(base, config)
    kinds = [type(layer) for layer in model.base_model.model]
    assert kinds == [peft.tuners.lora.Linear, LoraLinear]
