"""How the processes of a run share the model. Tensor parallelism: each group of N processes holds
one model. Data parallelism: each such group is a replica.

World size = N x replicas. Each replica samples and trains on its own rows; within a group all
processes work on the same rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.config.lora_targets import has_experts, text_part

if TYPE_CHECKING:
    from collections.abc import Mapping

KEY = "model.tensor_parallel_size"

SPLIT_MODELS = frozenset(
    ("gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "qwen2", "qwen3")
)
"""Model types (transformers 5.17) whose layers vLLM splits in a way that the trainer supports:
separate q, k, v, o, gate, up and down projections, whole heads, no mixture of experts. Checked by
tests/engine/test_engine_tensor_parallel.py.
"""

ELEMENTWISE = frozenset(("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop", "adagrad"))
"""Optimizers that update each value of a tensor independently, so that updating a part of a tensor
gives the same values as updating the whole tensor.
"""

SLICED_INITS = (True, False, "gaussian")
"""Values of init_lora_weights that do not depend on the base weights: each rank keeps its part of
the values that one process would have drawn.
"""

VOCABULARY_PADDING = 64
"""vLLM pads the vocabulary to a multiple of this number before it splits it (0.25.1 to 0.31.0)."""


def size_of(value: Any) -> int:
    """tensor_parallel_size as a number: an "auto" that is not resolved yet counts as 1."""
    return value if isinstance(value, int) else 1


def replicas(world_size: int, size: Any) -> int:
    """The number of groups of ``size`` processes in a run. If ``size`` is not resolved yet or does
    not divide ``world_size``, the number of processes.
    """
    number = size_of(size)
    return world_size // number if number > 0 and world_size % number == 0 else world_size


def shape_problem(config: Mapping[str, Any], size: int) -> str | None:
    """Why the model of this config.json cannot be split over ``size`` cards; None if it can."""
    text = text_part(config)
    heads = _whole(text, "num_attention_heads")
    kv_heads = _whole(text, "num_key_value_heads") or heads
    inner, vocabulary = _whole(text, "intermediate_size"), _whole(text, "vocab_size")
    if heads is not None and heads % size:
        return f"{size} does not divide the model's {heads} attention heads"
    if kv_heads is not None and kv_heads % size and size % kv_heads:
        return f"{size} neither divides the model's {kv_heads} KV heads nor is a multiple of them"
    if inner is not None and inner % size:
        return f"{size} does not divide the model's intermediate_size {inner}"
    if vocabulary is not None:
        padded = -(-vocabulary // VOCABULARY_PADDING) * VOCABULARY_PADDING
        if padded % size:
            return f"{size} does not divide the padded vocabulary {padded}"
        if padded // size * (size - 1) >= vocabulary:
            return f"the vocabulary of {vocabulary} leaves nothing for the last of {size} cards"
    return None


def model_problem(config: Mapping[str, Any]) -> str | None:
    """Why a model of this kind (its config.json) cannot be split at all; None if it can."""
    text = text_part(config)
    kind = str(text.get("model_type") or config.get("model_type") or "")
    if has_experts(dict(text)):
        return "a mixture of experts is not split: the trainer does not follow vLLM's expert layers"
    if kind not in SPLIT_MODELS:
        known = ", ".join(sorted(SPLIT_MODELS))
        return f"model type {kind!r} is not among those that the trainer follows ({known})"
    if config.get("quantization_config"):
        return "packed weights are not split: the trainer reads them whole"
    return None


def sizes(config: Mapping[str, Any] | None, world_size: int) -> list[int]:
    """The values of tensor_parallel_size that "auto" may choose from, in ascending order.
    ``config`` is None if the model is not on this machine.
    """
    found = [number for number in range(1, world_size + 1) if world_size % number == 0]
    if config is None:
        return found
    if model_problem(config) is not None:
        return [1]
    return [number for number in found if number == 1 or shape_problem(config, number) is None]


def _whole(text: Mapping[str, Any], name: str) -> int | None:
    value = text.get(name)
    return value if type(value) is int and value > 0 else None
