"""An engine with the options that sizing chose uses the memory that sizing predicted: weights, KV
cache and LoRA slots.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import MappingProxyType

import pytest

from toolkit.config.run_config import LoraSection, ModelSection, RunConfig, RuntimeSection
from toolkit.sizing import resolve

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))

pytestmark = pytest.mark.engine


def test_the_engine_uses_the_predicted_memory(tmp_path: Path) -> None:
    import torch
    from tiny_llama import make_tiny

    from toolkit.engine.open_engine import open_engine
    from toolkit.policy.engine_model import engine_options
    from toolkit.policy.from_config import make_load_request
    from toolkit.policy.model_files import find_checkpoint

    folder = make_tiny(tmp_path / "tiny")
    config = RunConfig(
        model=ModelSection(model_name=str(folder), max_seq_length=128),
        lora=LoraSection(r=12),
        grpo=MappingProxyType({"max_completion_length": 64, "max_prompt_length": 64}),
        runtime=RuntimeSection(engine="vllm"),
    )
    resolved, sizing = resolve(config, None)
    options = engine_options(find_checkpoint(str(folder)), make_load_request(resolved))
    with open_engine(options) as engine:
        cache = engine.llm.llm_engine.vllm_config.cache_config
        tokens = cache.num_gpu_blocks * cache.block_size
        weights, slots = {}, {}
        for parameter in engine.module.parameters():
            storage = parameter.untyped_storage()
            weights[storage.data_ptr()] = storage.nbytes()
        for module in engine.module.modules():
            for name, value in vars(module).items():
                if "lora_" in name and "stacked" in name:
                    for tensor in value if isinstance(value, tuple | list) else [value]:
                        assert isinstance(tensor, torch.Tensor)
                        storage = tensor.untyped_storage()
                        slots[storage.data_ptr()] = storage.nbytes()
    assert sum(weights.values()) == sizing.model.weight_bytes
    assert sum(slots.values()) == sizing.engine.lora_slots_bytes
    assert tokens * sizing.model.kv_bytes_per_token == sizing.choice.kv_cache_bytes
