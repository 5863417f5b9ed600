"""The bound that a rule has for the KV cache is never above what the sizer computes."""

from __future__ import annotations

from toolkit.config.kv_cache import least_cache_bytes
from toolkit.config.lora_targets import text_part
from toolkit.sizing import kv_bytes
from toolkit.sizing.spec import spec_from_values

UNIFORM = ("Llama-3.1-8B", "Qwen3-8B", "Qwen2.5-7B")


def test_the_rule_refuses_nothing_that_the_sizer_takes(shape) -> None:
    spec = spec_from_values(shape["config"], name=shape["id"])
    for tokens, block in ((7, 16), (4096, 16), (4096, 128)):
        least = least_cache_bytes(
            text_part(shape["config"]), tokens=tokens, element_bytes=2, block_tokens=block
        )
        exact = sum(kv_bytes.sequence_bytes(spec, n, 2, block_tokens=block) for n in (tokens, 1))
        assert least is None or 0 < least <= exact
        if any(name in shape["id"] for name in UNIFORM):
            assert least == exact
