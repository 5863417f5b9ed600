"""Hybrid models of 2026: the states of linear layers, and models that can be sized although their
training is not supported.
"""

from __future__ import annotations

import pytest

from toolkit.sizing import solve
from toolkit.sizing.spec import spec_from_values

# The published shapes of Qwen3.5-9B's language model, GLM-4.5-Air, LFM2-1.2B and Nemotron-H-8B.
QWEN = {
    "model_type": "qwen3_5_text", "vocab_size": 248320, "hidden_size": 4096,
    "intermediate_size": 12288, "num_hidden_layers": 32, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 256, "linear_num_key_heads": 16,
    "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
}  # fmt: skip
GLM = {
    "model_type": "glm4_moe", "vocab_size": 151552, "hidden_size": 4096, "head_dim": 128,
    "intermediate_size": 10944, "num_hidden_layers": 46, "num_attention_heads": 96,
    "num_key_value_heads": 8, "moe_intermediate_size": 1408, "n_routed_experts": 128,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "attention_bias": True,
}  # fmt: skip
LFM = {
    "model_type": "lfm2", "vocab_size": 65536, "hidden_size": 2048, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 12288,
    "full_attn_idxs": [2, 5, 8, 10, 12, 14],
}  # fmt: skip
NEMOTRON = {
    "model_type": "nemotron_h", "vocab_size": 131072, "hidden_size": 4096,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 21504, "mamba_num_heads": 128, "mamba_head_dim": 64,
    "ssm_state_size": 128, "n_groups": 8,
    "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
}  # fmt: skip


# Gemma 4 E4B's language model: 18 of its 42 layers use the cache of an earlier layer.
GEMMA = {
    "model_type": "gemma4_text", "vocab_size": 262144, "hidden_size": 2560,
    "intermediate_size": 10240, "num_hidden_layers": 42, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 256, "global_head_dim": 512, "sliding_window": 512,
    "hidden_size_per_layer_input": 256, "num_kv_shared_layers": 18,
}  # fmt: skip


def state_elements(values):
    """Elements of all states of one sequence."""
    spec = spec_from_values(values, name="m")
    return sum(block.count * block.cache.state_elements for block in spec.blocks)


@pytest.mark.parametrize(
    ("values", "billions", "kv_bytes", "state"),
    [
        # 8 attention layers; 24 layers with a state of 32 x 128 x 128 and 3 inputs of 8192 channels
        (QWEN, 8.95, 8 * 2 * 4 * 256 * 2, 24 * (32 * 128 * 128 + 8192 * 3)),
        (GLM, 106.8, 46 * 2 * 8 * 128 * 2, 0),
        (LFM, 1.17, 6 * 2 * 8 * 64 * 2, 10 * 2048 * 2),
        (NEMOTRON, 8.1, 4 * 2 * 8 * 128 * 2, 24 * (8192 * 128 + 10240 * 3)),
    ],
    ids=["qwen3.5", "glm4.5", "lfm2", "nemotron-h"],
)
def test_parameters_cache_and_states(spec_of, card, run, values, billions, kv_bytes, state):
    spec = spec_from_values(values, name="m")
    assert spec.parameters / 1e9 == pytest.approx(billions, rel=0.01)
    assert state_elements(values) == state
    result = solve(run(), spec, card("b300"))
    assert result.model.kv_bytes_per_token == kv_bytes
    assert result.model.margin == 0
    assert result.feasible


def test_layers_that_use_another_cache_have_none(card, run):
    spec = spec_from_values(GEMMA, name="m")
    caching = sum(block.count for block in spec.blocks if block.cache.kind != "none")
    assert caching == 24
    windows = {block.cache.window for block in spec.blocks if block.cache.kind == "sliding"}
    assert windows == {512}
    full = [block for block in spec.blocks if block.cache.kind == "full"]
    assert sum(block.count for block in full) == 4
    assert all(block.cache.key_elements == 2 * 512 for block in full)
    assert solve(run(), spec, card("h100")).feasible


def test_a_multimodal_config_is_sized_by_its_language_model():
    multimodal = {"model_type": "qwen3_5", "text_config": QWEN, "vision_config": {}}
    spec = spec_from_values(multimodal, name="m")
    assert spec.parameters == spec_from_values(QWEN, name="m").parameters
    assert any(
        "the model is sized, but training it is not supported" in note for note in spec.notes
    )


def test_a_pattern_with_an_unknown_letter_is_refused():
    from toolkit.base.errors import InputError

    with pytest.raises(InputError, match="unknown kinds of layers: X"):
        spec_from_values({**NEMOTRON, "hybrid_override_pattern": "MX*"}, name="m")
