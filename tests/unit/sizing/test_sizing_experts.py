"""target_modules "auto" on a mixture of experts: the sizer counts the layers that training adapts
and for which the engine has LoRA slots.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from toolkit.config.lora_targets import ATTENTION_PROJECTIONS
from toolkit.sizing import lora_bytes, solve

QWEN, MIXTRAL, DEEPSEEK = (
    "Qwen/Qwen3-30B-A3B",
    "mistralai/Mixtral-8x7B-v0.1",
    "deepseek-ai/DeepSeek-V3",
)


def test_the_adapter_is_on_attention(spec_of, card, run):
    spec = spec_of(QWEN)
    config = run(checkpointing=True)
    assert config.lora.target_modules == "auto"
    result = solve(config, spec, card("h200"))
    attention = 48 * 16 * (3 * (2048 + 0) + 4096 + 2 * 512 + (4096 + 2048))
    assert result.model.trainable_parameters == attention
    assert result.choice.target_modules == ATTENTION_PROJECTIONS
    assert not any(term.name == "trainer.expert_updates" for term in result.terms)
    assert any("LoRA slots: q_proj, k_proj, v_proj, o_proj" in n for n in result.model.notes)
    assert result.apply(config).lora.target_modules == ATTENTION_PROJECTIONS


def test_the_same_targets_set_explicitly_give_the_same_terms(spec_of, card, run):
    config = run(checkpointing=True)
    written = replace(config, lora=replace(config.lora, target_modules=ATTENTION_PROJECTIONS))
    spec = spec_of(QWEN)
    assert solve(written, spec, card("h200")).terms == solve(config, spec, card("h200")).terms


@pytest.mark.parametrize(
    ("name", "targets"), [(MIXTRAL, ATTENTION_PROJECTIONS), (DEEPSEEK, ("q_b_proj", "o_proj"))]
)
def test_default_targets_are_layers_of_the_model(spec_of, name, targets):
    spec = spec_of(name)
    assert spec.targets == targets
    leaves = {linear.leaf for block in spec.blocks for linear in block.linears}
    assert set(targets) <= leaves
    assert lora_bytes.adapter_parameters(spec, 8, targets) > 0


def test_every_model_of_the_table_has_its_default_targets(spec_of, shape):
    """The default targets are layers of the model and not experts, so a run file without
    target_modules is not refused.
    """
    spec = spec_of(shape["id"])
    leaves = {linear.leaf for block in spec.blocks for linear in block.linears}
    assert set(spec.targets) <= leaves
    assert not lora_bytes.expert_targets(spec, spec.targets)
