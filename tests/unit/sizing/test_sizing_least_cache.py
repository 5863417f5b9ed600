"""The minimum KV cache in a validation rule is never larger than the cache that the sizer
computes.
"""

from __future__ import annotations

from toolkit.config.lora_targets import get_text_config
from toolkit.config.model_facts import min_cache_bytes
from toolkit.sizing import kv_bytes
from toolkit.sizing.spec import spec_from_values
from toolkit.sizing.tensor_parallel import spec_of_one_card

UNIFORM = ("Llama-3.1-8B", "Qwen3-8B", "Qwen2.5-7B")


def test_the_rule_refuses_no_cache_that_the_sizer_accepts(shape) -> None:
    spec = spec_from_values(shape["config"], name=shape["id"])
    for tokens, block in ((7, 16), (4096, 16), (4096, 128)):
        min_bytes = min_cache_bytes(
            get_text_config(shape["config"]), tokens=tokens, element_bytes=2, block_tokens=block
        )
        exact = sum(kv_bytes.sequence_bytes(spec, n, 2, block_tokens=block) for n in (tokens, 1))
        assert min_bytes is None or 0 < min_bytes <= exact
        if any(name in shape["id"] for name in UNIFORM):
            assert min_bytes == exact


def test_each_card_has_at_least_one_kv_head(spec_of) -> None:
    name = "Qwen/Qwen2.5-1.5B-Instruct"  # 2 KV heads
    text = {"num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2}
    for cards in (1, 2, 4):
        min_bytes = min_cache_bytes(
            {**text, "head_dim": 128}, tokens=4096, element_bytes=2, block_tokens=16, gpus=cards
        )
        card_spec = spec_of_one_card(spec_of(name), cards)
        exact = sum(kv_bytes.sequence_bytes(card_spec, n, 2, block_tokens=16) for n in (4096, 1))
        assert min_bytes == exact
