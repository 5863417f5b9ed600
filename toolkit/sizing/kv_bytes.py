"""Compute the memory of the engine's KV cache: per token, per sequence, and for all sequences.

tests/contract/test_sizing_engine.py compares the results with vLLM's KVCacheSpec (page_size_bytes /
block_size and max_memory_usage_bytes).
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from toolkit.config.model_facts import GPU_BLOCK_TOKENS

if TYPE_CHECKING:
    from toolkit.sizing.model_blocks import Cache, ModelSpec

STATES_PER_SEQUENCE = 2


def bytes_per_token(spec: ModelSpec, element_bytes: int) -> int:
    """The KV bytes that a sequence needs for one more token. A sequence that is longer than
    the window of a sliding-window layer needs fewer bytes.
    """
    return sum(block.count * _token_bytes(block.cache, element_bytes) for block in spec.blocks)


def sequence_bytes(
    spec: ModelSpec,
    tokens: int,
    element_bytes: int,
    *,
    block_tokens: int = GPU_BLOCK_TOKENS,
    batched_tokens: int = 0,
) -> int:
    """The KV bytes of one sequence of ``tokens`` tokens, rounded up to blocks.

    A sliding-window layer keeps its window, the tokens of the current scheduler step
    (``batched_tokens``) and one more block (SlidingWindowSpec.max_memory_usage_bytes).
    """
    return sum(
        layers * _layer_bytes(cache, tokens, element_bytes, block_tokens, batched_tokens)
        for cache, layers in padded_layer_counts(spec).items()
    )


def shared_bytes(spec: ModelSpec, tokens: int, element_bytes: int, *, block_tokens: int) -> int:
    """The KV bytes that two sequences with the same prompt share. The prompt has ``tokens`` tokens.
    Only full blocks are shared. vLLM computes the last token of a prompt again, so the block of
    this token is not shared.

    The result is 0 if a layer has a sliding window or a state, because then vLLM may free or copy
    blocks of the prompt.
    """
    if any(b.cache.window is not None or b.cache.kind == "linear" for b in spec.blocks):
        return 0
    blocks = max(tokens - 1, 0) // block_tokens
    return sequence_bytes(spec, blocks * block_tokens, element_bytes, block_tokens=block_tokens)


def padded_layer_counts(spec: ModelSpec) -> dict[Cache, int]:
    """Return a mapping from each kind of KV cache to the number of layers for which vLLM allocates
    this kind of cache, padding layers included.

    All kinds of cache share the same pools of pages. Therefore vLLM divides the layers of each kind
    into groups of one size. If the layers of a kind do not fill its last group, vLLM adds padding
    layers to this group. Let ``least`` be the number of layers of the rarest kind, and ``most``
    that of the commonest kind. If ``most`` is below 1.5 x ``least``, a group has ``most`` layers.
    If not, a group has ``least`` layers (v1/core/kv_cache_utils.py,
    ``_get_kv_cache_groups_uniform_page_size``).
    """
    counts: Counter[Cache] = Counter()
    for block in spec.blocks:
        counts[block.cache] += block.count
    least, most = min(counts.values()), max(counts.values())
    group_size = most if most < 1.5 * least else least
    return {cache: -(-count // group_size) * group_size for cache, count in counts.items()}


def _token_bytes(cache: Cache, element_bytes: int) -> int:
    return (cache.key_elements + cache.value_elements) * element_bytes


def _layer_bytes(
    cache: Cache, tokens: int, element_bytes: int, block_tokens: int, batched_tokens: int
) -> int:
    if cache.kind == "linear":
        # With prefix caching there are two states per sequence (MambaSpec, mode "align"). They are
        # never stored in 8 bits.
        return STATES_PER_SEQUENCE * cache.state_elements * max(element_bytes, 2)
    page = _token_bytes(cache, element_bytes) * block_tokens
    if cache.window is not None:
        kept_tokens = min(cache.window - 1 + batched_tokens, tokens)
        return (-(-kept_tokens // block_tokens) + 1) * page
    return -(-tokens // block_tokens) * page
