"""The behaviour of PEFT 0.21.2 that toolkit.policy depends on. The name of a failed test names the
behaviour that has changed in PEFT.
"""

from __future__ import annotations

import inspect
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from toolkit.policy.lora_settings import INIT_METHODS, LoraSettings

pytestmark = pytest.mark.contract

TARGETS = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def checkpoint_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sys.path.append(str(Path(__file__).resolve().parents[1] / "fixtures"))
    from tiny_llama import make_tiny

    return make_tiny(tmp_path_factory.mktemp("contract") / "tiny")


@pytest.fixture
def base(checkpoint_folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(checkpoint_folder)


@pytest.fixture
def model(base: Any) -> Any:
    return peft.get_peft_model(base, _lora_config())


def _lora_config(**values: Any) -> Any:
    return peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=TARGETS, **values)


def test_lora_config_has_a_field_for_each_setting() -> None:
    settings = {item.name for item in fields(LoraSettings)} - {"random_state"}
    assert settings <= {item.name for item in fields(peft.LoraConfig)}


def test_every_init_is_documented_by_peft() -> None:
    text = inspect.getsource(peft.LoraConfig) + inspect.getsource(LoraLayer)
    assert all(f'"{init}"' in text or f"'{init}'" in text for init in INIT_METHODS)


def test_get_peft_model_returns_the_causal_class(model: Any) -> None:
    assert type(model) is peft.PeftModelForCausalLM


def test_adapters_on_a_bfloat16_model_are_float32(base: Any) -> None:
    model = peft.get_peft_model(base.to(torch.bfloat16), _lora_config())
    adapter_dtypes = {value.dtype for name, value in model.named_parameters() if "lora_" in name}
    assert adapter_dtypes == {torch.float32}


def test_lora_a_is_drawn_only_from_the_cpu_generator(checkpoint_folder: Path) -> None:
    """The same seed gives the same bytes. Other generators and the hash order do not matter."""
    from transformers import AutoModelForCausalLM

    lora_a_tensors = []
    for targets in (TARGETS, TARGETS[::-1]):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(1)
            model = peft.get_peft_model(
                AutoModelForCausalLM.from_pretrained(checkpoint_folder),
                peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets),
            )
        lora_a_tensors.append(
            {name: value for name, value in model.named_parameters() if "lora_A" in name}
        )
    assert lora_a_tensors[0].keys() == lora_a_tensors[1].keys()
    assert all(
        torch.equal(lora_a_tensors[0][name], lora_a_tensors[1][name]) for name in lora_a_tensors[0]
    )


def test_tensor_names_in_the_adapter_file(model: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model.save_pretrained(tmp_path, save_embedding_layers=False)
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    assert {f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"} <= names
    assert names == set(peft.get_peft_model_state_dict(model, save_embedding_layers=False))


def test_the_config_file_keeps_its_keys(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert values["peft_type"] == "LORA"
    assert sorted(values["target_modules"]) == TARGETS
    assert {"r", "lora_alpha", "use_rslora", "base_model_name_or_path", "revision"} <= values.keys()


def test_a_named_adapter_is_saved_in_its_own_folder(model: Any, tmp_path: Path) -> None:
    model.add_adapter("other", _lora_config())
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    assert (tmp_path / "other" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_attributes_of_a_lora_layer(model: Any) -> None:
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert isinstance(layer, LoraLayer)
    assert layer.lora_A["default"].weight.shape == (4, 64)
    assert layer.lora_B["default"].weight.shape == (64, 4)
    assert layer.scaling["default"] == 2.0
    assert layer.get_base_layer() is layer.base_layer
    assert layer.get_delta_weight("default").shape == layer.base_layer.weight.shape
    assert dict(layer.lora_variant) == {}


def test_a_second_adapter_is_frozen_and_can_be_deleted(model: Any) -> None:
    before = {name: value.requires_grad for name, value in model.named_parameters()}
    model.add_adapter("other", _lora_config())
    assert {name: value.requires_grad for name, value in model.named_parameters()} == {
        **before,
        **{name.replace("default", "other"): False for name in before if "lora_" in name},
    }
    model.set_adapter("other")
    assert model.active_adapter == "other"
    model.set_adapter("default")
    model.delete_adapter("other")
    assert {name: value.requires_grad for name, value in model.named_parameters()} == before


def test_unload_restores_the_base_model(base: Any) -> None:
    ids = torch.tensor([[4, 5, 6]])
    before, names = base(ids).logits, [name for name, _ in base.named_parameters()]
    model = peft.PeftModelForCausalLM(base, _lora_config(init_lora_weights=False))
    assert not torch.equal(model(ids).logits, before)
    assert model.unload() is base
    assert torch.equal(base(ids).logits, before)
    assert [name for name, _ in base.named_parameters()] == names
    assert not hasattr(base, "peft_config")


def test_disable_adapter_gives_the_outputs_of_the_base(base: Any) -> None:
    ids = torch.tensor([[4, 5, 6]])
    before = base(ids).logits
    model = peft.get_peft_model(base, _lora_config(init_lora_weights=False))
    assert model._adapters_disabled is False
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, before)
        assert model._adapters_disabled is True


def test_loading_does_not_report_a_missing_tensor(model: Any) -> None:
    """set_peft_model_state_dict accepts a file without one of the tensors, so we check the file
    first.
    """
    tensors = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors.pop(sorted(tensors)[0])
    peft.set_peft_model_state_dict(model, tensors)


def test_a_peft_model_has_the_attributes_of_its_base(base: Any) -> None:
    base.something_of_ours = 3
    assert peft.get_peft_model(base, _lora_config()).something_of_ours == 3


def test_the_fields_of_an_adapters_config_are_the_recorded_ones() -> None:
    """The fields that PEFT always writes, and the fields that define an adapter
    (config.adapter_facts).
    """
    from toolkit.config.adapter_facts import BOOKKEEPING, PEFT_DEFAULTS, SUPPORTED
    from toolkit.policy.lora_settings import LoraSettings

    nonempty = {name: value for name, value in LoraConfig().to_dict().items() if value}
    assert {k: v for k, v in nonempty.items() if k not in (*SUPPORTED, *BOOKKEEPING)} == (
        PEFT_DEFAULTS
    )
    assert {item.name for item in fields(LoraSettings)} - {"random_state"} == set(SUPPORTED)
    assert set(SUPPORTED) < set(LoraConfig().to_dict())
