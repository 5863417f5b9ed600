"""The least KV cache that an engine starts with, from config.json alone.

The sizer has the exact number, for every family (``sizing.kv``). This is a bound from below for
attention with keys and values, so that a rule can judge without it; tests/unit/sizing compares
the two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.config.supported_features import head_size

if TYPE_CHECKING:
    from collections.abc import Mapping

GPU_BLOCK, CPU_BLOCK = 16, 128  # tokens of a KV block (vllm/platforms/{cuda,cpu}.py)
ATTENTION_LAYERS = frozenset(("full_attention", "sliding_attention", "chunked_attention"))
OTHER_CACHES = (
    "mamba", "linear_", "conv_L_cache", "ssm", "hybrid_override", "full_attn_idxs",
    "attn_type_list", "cla_", "multi_query", "num_kv_heads",
)  # fmt: skip
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def least_cache_bytes(
    text: Mapping[str, Any], *, tokens: int, element_bytes: int, block_tokens: int, cards: int = 1
) -> int | None:
    """Bytes of one sequence of ``tokens`` and of the block that vLLM keeps empty, or fewer; None
    for models that keep something else than keys and values of each layer.

    ``text`` is the part of config.json that describes the language model. A window counts for all
    layers: the bound is then lower than need be. ``cards`` is the number of GPUs that share the
    model: each has its part of the KV heads, at least one.
    """
    layers, heads = text.get("num_hidden_layers"), text.get("num_attention_heads")
    counts = (layers, text.get("num_key_value_heads", heads), head_size(text))
    if not all(type(count) is int and count > 0 for count in counts):
        return None
    kinds = text.get("layer_types") or ()
    if set(kinds) - ATTENTION_LAYERS or text.get("num_kv_shared_layers") or _has_others(text):
        return None
    window = text.get("sliding_window")
    kept = min(tokens, window) if type(window) is int and window > 0 else tokens
    blocks = -(-kept // block_tokens) + 1
    layers, kv_heads, size = (count for count in counts if count is not None)
    values = 2 * layers * -(-kv_heads // cards) * size
    return values * element_bytes * block_tokens * blocks


def _has_others(text: Mapping[str, Any]) -> bool:
    """Whether some layers keep a state instead (Mamba, linear attention), or caches are shared, by
    the keys that say so; KV heads under another key than the usual one count as well.
    """
    return any(name.startswith(OTHER_CACHES) for name in text)
