"""Adapters on a mixture-of-experts model: by default only attention is adapted, and modules that
the engine cannot adapt are refused.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from toolkit.base.errors import ToolkitWarning, UnsupportedError
from toolkit.policy.language_model import DEFAULT_TARGETS, FastLanguageModel
from toolkit.policy.lora import add_lora
from toolkit.policy.lora_settings import LoraSettings, default_targets_of

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.fixture
def moe_model() -> Any:
    """A tiny Qwen3-MoE model whose layers all have experts."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            vocab_size=64,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
        )
    )


def adapted_layers(model: Any) -> set[str]:
    """The last name components of the adapted layers."""
    names = [name for name, value in model.named_parameters() if value.requires_grad]
    return {name.partition(".lora_")[0].rpartition(".")[2] for name in names}


def test_by_default_only_attention_of_a_moe_model_is_adapted(moe_model: Any) -> None:
    with pytest.warns(ToolkitWarning, match=r"adapter is only on q_proj, k_proj, v_proj, o_proj"):
        model = FastLanguageModel.get_peft_model(moe_model, r=4, use_gradient_checkpointing=False)
    assert adapted_layers(model) == ATTENTION


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
def test_without_an_engine_experts_can_be_adapted(moe_model: Any) -> None:
    model = add_lora(moe_model, LoraSettings(r=4, target_modules=DEFAULT_TARGETS))
    assert any("experts" in name for name, p in model.named_parameters() if p.requires_grad)


def test_with_an_engine_adapted_experts_are_refused(moe_model: Any) -> None:
    moe_model.toolkit_engine = SimpleNamespace(options=SimpleNamespace(max_lora_rank=64))
    with pytest.raises(UnsupportedError, match=r"gate_proj, up_proj, down_proj are the experts"):
        add_lora(moe_model, LoraSettings(r=4, target_modules=DEFAULT_TARGETS))
    assert adapted_layers(
        add_lora(moe_model, LoraSettings(r=4, target_modules=default_targets_of(moe_model)))
    ) == (ATTENTION)


def test_by_default_all_projections_of_a_dense_model_are_adapted(load: Any) -> None:
    model, _ = load()
    assert default_targets_of(model) == DEFAULT_TARGETS
