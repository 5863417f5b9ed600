"""What the engine's KV cache takes: a token, a sequence, all sequences.

Held to vLLM's own KVCacheSpec (page_size_bytes / block_size and max_memory_usage_bytes) by
tests/contract/test_sizing_engine.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from toolkit.sizing.model import Cache, ModelSpec

STATES = 2
BLOCK_TOKENS = 16  # vLLM's default block on CUDA; the CPU engine's is 128


def bytes_per_token(spec: ModelSpec, element_bytes: int) -> int:
    """KV bytes that one more token adds while every window is open."""
    return sum(block.count * _token_bytes(block.cache, element_bytes) for block in spec.blocks)


def sequence_bytes(
    spec: ModelSpec,
    tokens: int,
    element_bytes: int,
    *,
    block_tokens: int = BLOCK_TOKENS,
    batched_tokens: int = 0,
) -> int:
    """KV bytes of one sequence of ``tokens``, rounded up to blocks.

    A sliding layer keeps its window, the tokens of the step in flight (``batched_tokens``) and one
    more block (SlidingWindowSpec.max_memory_usage_bytes).
    """
    total = 0
    for block in spec.blocks:
        total += block.count * _layer_bytes(
            block.cache, tokens, element_bytes, block_tokens, batched_tokens
        )
    return total


def _token_bytes(cache: Cache, element_bytes: int) -> int:
    return (cache.key_elements + cache.value_elements) * element_bytes


def _layer_bytes(
    cache: Cache, tokens: int, element_bytes: int, block_tokens: int, batched_tokens: int
) -> int:
    if cache.kind == "linear":
        # Two states a sequence while prefixes are cached (MambaSpec, mode "align"), never in 8
        # bits.
        return STATES * cache.state_elements * max(element_bytes, 2)
    page = _token_bytes(cache, element_bytes) * block_tokens
    if cache.window is not None:
        kept = min(cache.window - 1 + batched_tokens, tokens)
        return (-(-kept // block_tokens) + 1) * page
    return -(-tokens // block_tokens) * page
