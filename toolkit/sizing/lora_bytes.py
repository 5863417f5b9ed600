"""Count the bytes of LoRA: the buffers of the engine, whose rank is max_lora_rank, and the trained
adapter, whose rank is r.

vLLM allocates the buffers for max_loras adapters. The place for one adapter is called a slot. By
default, every linear layer, the experts and, in some models, the embedding and the head have slots
(vllm/lora/layers/*.py, ``create_lora_weights``). vLLM's setting lora_target_modules limits the
layers with slots. The engine of the toolkit uses it to give slots only to the projections.
tests/contract/test_sizing_engine.py checks that the bytes equal vLLM's allocation.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from toolkit.base.errors import ConfigError
from toolkit.config import lora_targets as names
from toolkit.config.libraries import LEGAL_RANKS, smallest_rank
from toolkit.config.lora_targets import SLOT_LAYERS

if TYPE_CHECKING:
    from collections.abc import Collection

    from toolkit.sizing.model_blocks import Block, Linear, ModelSpec

FUSED_LAYERS = (
    ("q_proj", "k_proj", "v_proj", "qkv_proj"),
    ("gate_proj", "up_proj", "gate_up_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa", "fused_qkv_a_proj"),
)


def legal_rank(rank: int) -> int:
    """Return the smallest max_lora_rank that vLLM allows and that is not below ``rank``. Raises
    ConfigError if ``rank`` is above the largest allowed value.
    """
    if legal := smallest_rank(rank):
        return legal
    raise ConfigError(
        f"lora.r {rank} is above {LEGAL_RANKS[-1]}, the largest rank that the engine supports",
        where="lora.r",
        fix=f"lower lora.r to {LEGAL_RANKS[-1]} or less",
    )


def engine_lora_elements(
    spec: ModelSpec, rank: int, slot_count: int, modules: Collection[str] | None = None
) -> int:
    """The number of elements of the engine's LoRA buffers.

    ``modules`` selects the layers that have slots, by the last parts of their names (vLLM's
    lora_target_modules). With None, vLLM's default applies: every linear layer, the experts, and
    the embedding tables that the model declares as adaptable.
    """
    total = 0
    for block in spec.blocks:
        total += block.count * sum(
            _slot_elements(linear, rank)
            for linear in block.linears
            if modules is None or _has_slots(linear, modules)
        )
    # Shapes in VocabParallelEmbeddingWithLoRA: A (vocab, r), B (hidden, r). Shapes in
    # LogitsProcessorWithLoRA: A (r, hidden), B (vocab, r).
    tables = len(spec.lora_tables) if modules is None else 0
    total += tables * rank * (spec.vocab_size + spec.hidden_size)
    return slot_count * total


def fused_shapes(spec: ModelSpec) -> set[tuple[tuple[int, ...], int]]:
    """Return the shapes of the layers that have LoRA slots in the engine. The engine fuses some
    layers: q, k and v become one layer with three slices.

    A shape has two parts: a tuple with the number of rows of each slice, and the number of columns.
    """
    shapes = set()
    for block in spec.blocks:
        groups: dict[tuple[str, ...], list[Linear]] = {}
        for linear in block.linears:
            if linear.copies == 1 and _has_slots(linear, SLOT_LAYERS):
                parent = linear.name.rpartition(".")[0]
                fused = next((one for one in FUSED_LAYERS if linear.leaf in one), (linear.leaf,))
                groups.setdefault((parent, *fused), []).append(linear)
        for parts in groups.values():
            shapes.add((tuple(one.out_features for one in parts), parts[0].in_features))
    return shapes


def slot_modules(targets: tuple[str, ...] | str) -> tuple[str, ...]:
    """Return the names of the layers for which the toolkit's engine has LoRA slots (the buffers of
    an adapter). With this engine, no other layers can be trained.
    """
    return SLOT_LAYERS if isinstance(targets, str) else (*SLOT_LAYERS, *targets)


def _has_slots(linear: Linear, modules: Collection[str]) -> bool:
    """Whether ``linear`` has LoRA slots in an engine that gets ``modules``, the names of the layers
    with slots. If ``modules`` contains one slice of a fused layer, all slices of this layer have
    slots (vLLM's ``is_in_target_modules``).
    """
    if linear.copies > 1:
        return "experts" in modules
    fused = next((group for group in FUSED_LAYERS if linear.leaf in group), (linear.leaf,))
    return any(name in modules for name in fused)


def _slot_elements(linear: Linear, rank: int) -> int:
    return linear.copies * rank * (linear.in_features + linear.out_features)


def expert_targets(spec: ModelSpec, targets: tuple[str, ...] | str) -> frozenset[str]:
    """Return which of gate_proj, up_proj and down_proj PEFT adapts in the experts of this model, if
    the adapter has these ``targets``. PEFT adapts the weights of all experts as one tensor.
    """
    return names.expert_targets(spec.family, targets)


def is_targeted(linear: Linear, targets: tuple[str, ...] | str) -> bool:
    """Whether PEFT adapts ``linear``. If ``targets`` is a list, it must contain the last part or
    the last parts of the module's dotted name. If ``targets`` is a regular expression, the full
    name must match.

    The result is false for stacked experts, because they are not modules. ``expert_targets``
    handles them.
    """
    if linear.copies > 1:
        return False
    if isinstance(targets, str):
        if targets == "all-linear":
            return linear.leaf != "conv1d"
        return re.fullmatch(targets, f"model.layers.0.{linear.name}") is not None
    return any(linear.name == target or linear.name.endswith("." + target) for target in targets)


def adapted_linears(spec: ModelSpec, block: Block, targets: tuple[str, ...] | str) -> list[Linear]:
    """The modules of ``block`` that have an adapter."""
    expert_names = expert_targets(spec, targets)
    return [
        linear
        for linear in block.linears
        if is_targeted(linear, targets) and linear.leaf not in expert_names
    ]


@dataclass(frozen=True, slots=True)
class AdapterLayout:
    """How the adapter differs between layers: some modules or layers may have no adapter, or an
    adapter with another rank.
    """

    exclude: tuple[str, ...] | str | None = None
    rank_pattern: tuple[tuple[str, int], ...] = ()
    layers: tuple[int, ...] | None = None

    @property
    def is_uniform(self) -> bool:
        """Whether all layers have the same adapter."""
        return not (self.exclude or self.rank_pattern or self.layers is not None)

    def rank(self, module: str, layer: int, rank: int) -> int:
        """The rank of ``module`` in ``layer``; 0 if it has no adapter."""
        if self.layers is not None and layer not in self.layers:
            return 0
        name = f"model.layers.{layer}.{module}"
        if names.is_excluded(self.exclude, name):
            return 0
        return names.pattern_value(dict(self.rank_pattern), name, rank)


UNIFORM = AdapterLayout()


@cache
def ranks_by_layer(layout: AdapterLayout, module: str, layers: int, rank: int) -> tuple[int, ...]:
    """The rank of ``module`` in each layer of the model."""
    return tuple(layout.rank(module, layer, rank) for layer in range(layers))


def _sum_of_ranks(
    spec: ModelSpec, block: Block, linear: Linear, rank: int, layout: AdapterLayout
) -> int:
    """The sum of the ranks that ``linear`` has in the layers of ``block``.

    If a model has several kinds of layers, this function does not know which layer is of which
    kind. Then every layer of ``block`` counts with the largest rank.
    """
    if layout.is_uniform:
        return block.count * rank
    ranks = ranks_by_layer(layout, linear.name, spec.layers, rank)
    return sum(ranks) if len(spec.blocks) == 1 else block.count * max(ranks)


def adapter_parameters(
    spec: ModelSpec, rank: int, targets: tuple[str, ...] | str, layout: AdapterLayout = UNIFORM
) -> int:
    """The number of trainable parameters of the adapter: r x (in + out) for each adapted module
    (arXiv 2106.09685).

    With E experts, the LoRA matrix A has the shape (E r, in), and B has the shape (out, E r). The
    fused gate and up projection has twice the rank.
    """
    expert_names = expert_targets(spec, targets)
    total = 0
    for block in spec.blocks:
        total += sum(
            _sum_of_ranks(spec, block, linear, rank, layout)
            * (linear.in_features + linear.out_features)
            for linear in adapted_linears(spec, block, targets)
        )
        expert_parameters = 0
        for linear in block.linears:
            if linear.copies == 1 or linear.leaf not in expert_names:
                continue
            if linear.leaf == "down_proj":
                expert_parameters += (
                    linear.copies * rank * (linear.in_features + linear.out_features)
                )
            elif linear.leaf == "up_proj":
                fused = linear.in_features + 2 * linear.out_features
                expert_parameters += linear.copies * 2 * rank * fused
        total += block.count * expert_parameters
    return total


def expert_delta_elements(spec: ModelSpec, targets: tuple[str, ...] | str) -> int:
    """The number of elements of the updates (B x A) that PEFT computes for the adapted expert
    weights of one layer. PEFT computes the updates of all experts at the same time.
    """
    expert_names = expert_targets(spec, targets)
    return max(
        sum(
            linear.weights
            for linear in block.linears
            if linear.copies > 1 and linear.leaf in expert_names
        )
        for block in spec.blocks
    )
