"""For the model families of 2026, the sizer has the parameters and the linear layers that
transformers creates.
"""

from __future__ import annotations

from typing import Any

import pytest

from toolkit.sizing.spec import spec_from_values

pytestmark = pytest.mark.contract

HYBRID = {
    "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "num_hidden_layers": 8, "vocab_size": 1000, "linear_num_key_heads": 4,
    "linear_num_value_heads": 8, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {**HYBRID, "intermediate_size": 512},
    "qwen3_5_moe_text": {
        **HYBRID, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96,
        "shared_expert_intermediate_size": 128,
    },
    "gemma4_text": {
        "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "global_head_dim": 64, "num_hidden_layers": 12, "vocab_size": 1000,
        "intermediate_size": 512, "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": 1000, "num_kv_shared_layers": 4, "use_double_wide_mlp": True,
    },
    "glm4_moe": {
        "hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
        "num_hidden_layers": 4, "vocab_size": 1000, "intermediate_size": 512,
        "moe_intermediate_size": 96, "n_routed_experts": 8, "n_shared_experts": 2,
        "first_k_dense_replace": 1, "use_qk_norm": True, "attention_bias": True,
    },
    "lfm2": {
        "hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2,
        "num_hidden_layers": 6, "vocab_size": 1000, "intermediate_size": 1024,
        "layer_types": ["conv", "conv", "full_attention", "conv", "full_attention", "conv"],
    },
    "nemotron_h": {
        "hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32,
        "vocab_size": 1000, "intermediate_size": 512, "mamba_num_heads": 8, "mamba_head_dim": 32,
        "ssm_state_size": 16, "n_groups": 2, "n_routed_experts": 4, "moe_intermediate_size": 96,
        "moe_shared_expert_intermediate_size": 128,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
    },
}  # fmt: skip


CONFIGS["gemma4_text, experts"] = {
    "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "global_head_dim": 64, "num_global_key_value_heads": 1, "attention_k_eq_v": True,
    "num_hidden_layers": 6, "vocab_size": 1000, "intermediate_size": 512,
    "hidden_size_per_layer_input": 0, "enable_moe_block": True, "num_experts": 8,
    "top_k_experts": 2, "moe_intermediate_size": 96,
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_counts_and_linears_are_those_of_the_meta_model(name: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = name.partition(",")[0]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **CONFIGS[name]))
    spec = spec_from_values({"model_type": kind, **CONFIGS[name]}, name=name)
    assert spec.parameters == sum(parameter.numel() for parameter in model.parameters())
    module_counts: dict[tuple[str, int, int], int] = {}
    for name, module in model.named_modules():
        name_in_layer = name.rpartition(".layers.")[2].partition(".")[2]
        if isinstance(module, torch.nn.Linear) and name_in_layer:
            key = (name_in_layer, module.out_features, module.in_features)
            module_counts[key] = module_counts.get(key, 0) + 1
    expected: dict[tuple[str, int, int], int] = {}
    for block in spec.blocks:
        for linear in block.linears:
            if linear.copies == 1 and linear.leaf not in ("gate", "conv1d"):
                key = (linear.name, linear.out_features, linear.in_features)
                expected[key] = expected.get(key, 0) + block.count
    assert {key: module_counts.get(key) for key in expected} == expected
