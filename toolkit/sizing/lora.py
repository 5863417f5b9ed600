"""LoRA: the engine's slot buffers at max_lora_rank, and the adapter under training at r.

The engine gives every linear layer (and, in some models, embeddings and head) buffers of max_loras
slots, whatever the adapter targets (vllm/lora/layers/*.py, ``create_lora_weights``); held to its
allocation to the byte by tests/contract/test_sizing_engine.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.base.errors import ConfigError

if TYPE_CHECKING:
    from toolkit.sizing.model import Linear, ModelSpec

# vllm.config.lora.MaxLoRARanks, 0.25.1 to 0.31.
LEGAL_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def legal_rank(rank: int) -> int:
    """The smallest legal max_lora_rank holding ``rank``. Raises ConfigError above the largest."""
    for legal in LEGAL_RANKS:
        if legal >= rank:
            return legal
    raise ConfigError(
        f"lora.r {rank} is above {LEGAL_RANKS[-1]}, the largest rank that the engine serves",
        where="lora.r",
        fix=f"lower lora.r to {LEGAL_RANKS[-1]} or less",
    )


def engine_elements(spec: ModelSpec, rank: int, slots: int) -> int:
    """Elements of the engine's LoRA buffers."""
    total = 0
    for block in spec.blocks:
        total += block.count * sum(_slot_elements(linear, rank) for linear in block.linears)
    # VocabParallelEmbeddingWithLoRA: A (vocab, r), B (hidden, r); LogitsProcessorWithLoRA: A (r,
    # hidden), B (vocab, r).
    total += len(spec.lora_tables) * rank * (spec.vocab_size + spec.hidden_size)
    return slots * total


def _slot_elements(linear: Linear, rank: int) -> int:
    return linear.copies * rank * (linear.in_features + linear.out_features)


def targeted(linear: Linear, targets: tuple[str, ...] | str) -> bool:
    """Whether PEFT adapts this module: by leaf name or dotted end, or by full-match regex; routed
    experts are no modules.
    """
    if linear.copies > 1:
        return False
    if isinstance(targets, str):
        if targets == "all-linear":
            return linear.leaf != "conv1d"
        import re  # noqa: PLC0415 - only for the rare form

        return re.fullmatch(targets, f"model.layers.0.{linear.name}") is not None
    return any(linear.name == target or linear.name.endswith("." + target) for target in targets)


def adapter_parameters(spec: ModelSpec, rank: int, targets: tuple[str, ...] | str) -> int:
    """Trainable parameters of the adapter: r x (in + out) a targeted module (arXiv 2106.09685)."""
    return sum(
        block.count
        * sum(
            rank * (linear.in_features + linear.out_features)
            for linear in block.linears
            if targeted(linear, targets)
        )
        for block in spec.blocks
    )
