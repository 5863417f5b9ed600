"""The layers that target_modules "auto" adapts, and the target names that are experts."""

from __future__ import annotations

import pytest

from toolkit.config.lora_targets import (
    ATTENTION_PROJECTIONS,
    SLOT_LAYERS,
    default_targets,
    expert_targets,
    has_experts,
)
from toolkit.config.run_config import SEVEN_PROJECTIONS

DENSE = {"model_type": "llama"}
QWEN = {"model_type": "qwen3_moe", "num_experts": 128}


@pytest.mark.parametrize(
    ("config", "targets"),
    [
        (DENSE, SEVEN_PROJECTIONS),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, SEVEN_PROJECTIONS),
        ({"model_type": "phi3"}, ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
        (QWEN, ATTENTION_PROJECTIONS),
        ({"model_type": "mixtral", "num_local_experts": 8}, ATTENTION_PROJECTIONS),
        ({"model_type": "gpt_oss", "num_local_experts": 32}, ATTENTION_PROJECTIONS),
        ({"model_type": "x", "text_config": {"num_experts": 4}}, ATTENTION_PROJECTIONS),
        (
            {"model_type": "deepseek_v2", "n_routed_experts": 64, "kv_lora_rank": 512,
             "q_lora_rank": None},
            ("q_proj", "o_proj"),
        ),
        (
            {"model_type": "deepseek_v3", "n_routed_experts": 256, "kv_lora_rank": 512,
             "q_lora_rank": 1536},
            ("q_b_proj", "o_proj"),
        ),
        ({"num_experts": 1}, SEVEN_PROJECTIONS),
        ({"num_experts": "many", "text_config": []}, SEVEN_PROJECTIONS),
    ],
)  # fmt: skip
def test_auto_targets_depend_on_the_architecture(config, targets):
    assert default_targets(config) == targets
    assert set(targets) <= set(SLOT_LAYERS)  # the engine has slots for these layers
    assert not expert_targets(str(config.get("model_type")), targets)


@pytest.mark.parametrize(
    ("family", "targets", "experts"),
    [
        ("qwen3_moe", ("q_proj", "up_proj"), {"up_proj"}),
        ("qwen3_moe", ("mlp.down_proj",), {"down_proj"}),
        ("qwen3_moe", "all-linear", {"gate_proj", "up_proj", "down_proj"}),
        ("qwen3_moe", r".*\.up_proj", {"up_proj"}),
        ("qwen3_moe", r".*\.q_proj", set()),
        ("qwen3_moe", "(", set()),  # not a regular expression: rule LORA007
        ("qwen3_moe", "(.*)*" * 9 + "x", set()),  # matching could take very long
        ("llama", "all-linear", set()),
        ("mixtral", ("up_proj",), set()),  # Mixtral has no layer of this name
    ],
)
def test_expert_targets_are_the_names_of_stacked_experts(family, targets, experts):
    assert expert_targets(family, targets) == experts


@pytest.mark.parametrize(
    ("config", "mixture"),
    [
        (QWEN, True),
        (DENSE, False),
        ({"num_experts": 1}, False),
        ({"num_local_experts": 0, "num_experts": None}, False),
        ({"moe_num_experts": [64, 64]}, True),  # Ernie 4.5 VL
        ({"num_experts": [1, 1, 16]}, True),  # Hunyuan: one number per layer
        ({"num_experts": []}, False),
        # The inner value counts.
        ({"num_experts": 8, "text_config": {"num_experts": 1}}, False),
    ],
)
def test_has_experts_recognizes_mixtures(config, mixture):
    assert has_experts(config) is mixture
