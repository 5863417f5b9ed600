"""A loaded config of transformers has the names by which config.lora_targets finds out whether a
model is a mixture of experts. They are the names in config.json.
"""

from __future__ import annotations

import pytest
import transformers

from toolkit.config.lora_targets import default_targets, has_experts

pytestmark = pytest.mark.contract


@pytest.mark.parametrize(
    ("name", "arguments", "has_expert_layers"),
    [
        ("Qwen2Config", {}, False),
        ("Gemma3Config", {}, False),
        ("GraniteMoeHybridConfig", {"num_local_experts": 0}, False),
        ("HunYuanMoEV1Config", {"num_experts": 1}, False),
        ("HunYuanMoEV1Config", {"num_experts": 64}, True),
        ("JambaConfig", {"num_experts": 1}, False),
        ("MixtralConfig", {}, True),
        ("Qwen3MoeConfig", {}, True),
        ("GptOssConfig", {}, True),
        ("DeepseekV3Config", {}, True),
        ("Ernie4_5_MoeConfig", {}, True),
        ("Qwen3VLMoeConfig", {}, True),  # the number is in text_config
    ],
)
def test_experts_are_found_in_a_loaded_config(name, arguments, has_expert_layers):
    config = getattr(transformers, name)(**arguments)
    assert has_experts(config.to_dict()) is has_expert_layers
    assert ("gate_proj" in default_targets(config.to_dict())) is not has_expert_layers
