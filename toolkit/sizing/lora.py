"""LoRA: the engine's slot buffers at max_lora_rank, and the adapter under training at r.

The engine gives every linear layer (and, in some models, embeddings and head) buffers of max_loras
slots, whatever the adapter targets (vllm/lora/layers/*.py, ``create_lora_weights``); held to its
allocation to the byte by tests/contract/test_sizing_engine.py.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from toolkit.base.errors import ConfigError

if TYPE_CHECKING:
    from toolkit.sizing.model import Block, Linear, ModelSpec

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# Families whose experts PEFT reaches under these names (transformers' conversion "qwen2_moe").
EXPERT_CONVERTED = ("qwen3_moe", "qwen3_next", "deepseek_v2", "deepseek_v3")
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


def expert_targets(spec: ModelSpec, targets: tuple[str, ...] | str) -> frozenset[str]:
    """Which of gate_proj, up_proj, down_proj PEFT moves to the stacked experts of this model.

    In PEFT 0.21 (utils/transformers_weight_conversion.py) these names stop meaning the modules of
    dense and shared layers, and mean the expert parameters of transformers 5.
    """
    if spec.family not in EXPERT_CONVERTED:
        return frozenset()
    if isinstance(targets, str):
        if targets == "all-linear":
            return frozenset(PROJECTIONS)
        path = "model.layers.0.mlp.experts."
        return frozenset(name for name in PROJECTIONS if re.fullmatch(targets, path + name))
    ends = {target.rpartition(".")[2] for target in targets}
    return frozenset(name for name in PROJECTIONS if name in ends)


def targeted(linear: Linear, targets: tuple[str, ...] | str) -> bool:
    """Whether PEFT adapts this module: by leaf name or dotted end, or by full-match regex.

    Stacked experts are no modules: see ``expert_targets``.
    """
    if linear.copies > 1:
        return False
    if isinstance(targets, str):
        if targets == "all-linear":
            return linear.leaf != "conv1d"
        return re.fullmatch(targets, f"model.layers.0.{linear.name}") is not None
    return any(linear.name == target or linear.name.endswith("." + target) for target in targets)


def adapted(spec: ModelSpec, block: Block, targets: tuple[str, ...] | str) -> list[Linear]:
    """The modules of ``block`` that carry an adapter."""
    moved = expert_targets(spec, targets)
    return [
        linear for linear in block.linears if targeted(linear, targets) and linear.leaf not in moved
    ]


def adapter_parameters(spec: ModelSpec, rank: int, targets: tuple[str, ...] | str) -> int:
    """Trainable parameters of the adapter: r x (in + out) a targeted module (arXiv 2106.09685).

    Experts: A is (E r, in) and B is (out, E r); the fused gate and up have twice the rank.
    """
    moved = expert_targets(spec, targets)
    total = 0
    for block in spec.blocks:
        one = sum(
            rank * (linear.in_features + linear.out_features)
            for linear in adapted(spec, block, targets)
        )
        for linear in block.linears:
            if linear.copies == 1 or linear.leaf not in moved:
                continue
            if linear.leaf == "down_proj":
                one += linear.copies * rank * (linear.in_features + linear.out_features)
            elif linear.leaf == "up_proj":
                fused = linear.in_features + 2 * linear.out_features
                one += linear.copies * 2 * rank * fused
        total += block.count * one
    return total


def expert_delta_elements(spec: ModelSpec, targets: tuple[str, ...] | str) -> int:
    """Elements of one layer's adapted expert weights: PEFT forms their whole update at once."""
    moved = expert_targets(spec, targets)
    return max(
        sum(
            linear.weights for linear in block.linears if linear.copies > 1 and linear.leaf in moved
        )
        for block in spec.blocks
    )
