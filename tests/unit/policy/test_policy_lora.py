"""A new adapter: it has PEFT's class, it changes no logits, and equal seeds give equal tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from toolkit.base.errors import ConfigTypeError, ConfigValueError, UnsupportedError
from toolkit.policy.language_model import FastLanguageModel
from toolkit.policy.lora import adapter_tensors

SMALL_ADAPTER = {"r": 4, "lora_alpha": 8, "use_gradient_checkpointing": False}


def test_a_new_adapter_does_not_change_the_logits(load: Any, ids: Any) -> None:
    import peft

    model, _ = load()
    before = model(ids).logits
    adapted = FastLanguageModel.get_peft_model(model, **SMALL_ADAPTER)
    assert type(adapted) is peft.PeftModelForCausalLM
    assert torch.equal(adapted(ids).logits, before)
    trainable = {name for name, value in adapted.named_parameters() if value.requires_grad}
    assert trainable
    assert all(".lora_A." in name or ".lora_B." in name for name in trainable)


def test_the_same_seed_gives_equal_adapters_and_keeps_the_global_state(load: Any) -> None:
    def new_adapter_tensors(seed: int) -> dict[str, torch.Tensor]:
        adapted = FastLanguageModel.get_peft_model(load()[0], random_state=seed, **SMALL_ADAPTER)
        return {name: value.clone() for name, value in adapter_tensors(adapted).items()}

    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = new_adapter_tensors(3407)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    same_seed, other_seed = new_adapter_tensors(3407), new_adapter_tensors(3408)
    assert first.keys() == same_seed.keys()
    assert all(torch.equal(first[name], same_seed[name]) for name in first)
    assert any(not torch.equal(first[name], other_seed[name]) for name in first)


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 2.0), (True, 4.0)])
def test_layers_have_the_scaling_of_the_settings(load: Any, rslora: bool, scaling: float) -> None:
    model = FastLanguageModel.get_peft_model(
        load()[0], r=4, lora_alpha=8, use_rslora=rslora, use_gradient_checkpointing=False
    )
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert layer.scaling["default"] == scaling


def test_the_adapter_is_float32_over_a_bfloat16_base(load: Any) -> None:
    model, _ = load(dtype="bfloat16")
    adapted = FastLanguageModel.get_peft_model(model, **SMALL_ADAPTER)
    assert model.dtype is torch.bfloat16
    assert {value.dtype for value in adapter_tensors(adapted).values()} == {torch.float32}


def test_the_same_settings_again_give_a_warning(adapted: Any) -> None:
    model = adapted()
    with pytest.warns(UserWarning, match="already has this adapter"):
        assert FastLanguageModel.get_peft_model(model, r=4, lora_alpha=8) is model


def test_other_settings_are_refused_and_the_differences_listed(adapted: Any) -> None:
    with pytest.raises(
        ConfigTypeError,
        match="r is 4 in the adapter, but 16 is requested; lora_alpha is 8 in the adapter",
    ):
        FastLanguageModel.get_peft_model(adapted(), r=16, lora_alpha=9)
    with pytest.raises(TypeError, match="target_modules is"):
        FastLanguageModel.get_peft_model(adapted(), r=4, lora_alpha=8, target_modules=["q_proj"])


def test_an_unknown_keyword_is_refused_with_a_suggestion(load: Any) -> None:
    with pytest.raises(TypeError, match=r"'use_doras' .did you mean 'use_dora'"):
        FastLanguageModel.get_peft_model(load()[0], use_doras=True)


def test_another_max_seq_length_than_the_models_is_refused(load: Any) -> None:
    with pytest.raises(ValueError, match="but the model was loaded with max_seq_length=128"):
        FastLanguageModel.get_peft_model(load()[0], max_seq_length=512)
    FastLanguageModel.get_peft_model(load()[0], max_seq_length=128, **SMALL_ADAPTER)


def test_an_error_of_peft_becomes_a_config_error(load: Any) -> None:
    with pytest.raises(ConfigValueError, match="not supported"):
        FastLanguageModel.get_peft_model(load()[0], target_modules=["input_layernorm"])


@pytest.mark.parametrize(
    "values",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "gaussian"},
        {"rank_pattern": {"q_proj": 2}},
    ],
)
def test_without_an_engine_pefts_own_options_work(load: Any, ids: Any, values: Any) -> None:
    model, _ = load()
    before = model(ids).logits
    adapted = FastLanguageModel.get_peft_model(model, **{**SMALL_ADAPTER, **values})
    assert torch.allclose(adapted(ids).logits, before, atol=1e-5)
    config = adapted.peft_config["default"]
    name, value = next(iter(values.items()))
    configured = getattr(config, name)
    if name != "target_modules":
        assert configured == value
    if "layers_to_transform" in values:
        assert all(".layers.1." in key for key in adapter_tensors(adapted))


def test_a_rank_above_the_engines_maximum_is_refused(load: Any) -> None:
    """get_peft_model refuses the rank, before the engine's first step."""
    from types import SimpleNamespace

    model, _ = load()
    published: list[Any] = []
    model.toolkit_engine = SimpleNamespace(
        options=SimpleNamespace(max_lora_rank=16), publish=published.append
    )
    with pytest.raises(ValueError, match="r=17 is above max_lora_rank=16") as caught:
        FastLanguageModel.get_peft_model(model, r=17)
    assert "max_lora_rank=32" in str(caught.value)
    assert not any("lora_" in name for name, _ in model.named_parameters())
    adapted = FastLanguageModel.get_peft_model(model, r=16, use_gradient_checkpointing=False)
    assert published == [adapted]


def test_an_adapter_that_the_engine_refuses_is_removed(load: Any, ids: Any) -> None:
    from types import SimpleNamespace

    model, _ = load()
    before = model(ids).logits

    def refuse_adapter(peft_model: Any) -> None:
        raise UnsupportedError("the engine has no LoRA slot for model.layers.0.mlp.up_proj")

    model.toolkit_engine = SimpleNamespace(
        options=SimpleNamespace(max_lora_rank=16), publish=refuse_adapter
    )
    with pytest.raises(UnsupportedError, match="no LoRA slot"):
        FastLanguageModel.get_peft_model(model, r=4)
    assert not any("lora_" in name for name, _ in model.named_parameters())
    assert torch.equal(model(ids).logits, before)


def test_numbers_of_another_type_are_equal_settings(adapted: Any) -> None:
    with pytest.warns(UserWarning, match="already has this adapter"):
        FastLanguageModel.get_peft_model(adapted(), r=4, lora_alpha=8.0, lora_dropout=0)
