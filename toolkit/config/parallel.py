"""Compute how the processes of a run share the model. With tensor parallelism, a group of
``tensor_parallel_size`` processes splits one copy of the model. Such a group is called a replica.
With data parallelism, a run has several replicas.

The world size is ``tensor_parallel_size`` times the number of replicas. Each replica samples and
trains on its own rows. All processes of a replica work on the same rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.config.lora_targets import get_text_config, has_experts

if TYPE_CHECKING:
    from collections.abc import Mapping

TENSOR_PARALLEL_KEY = "model.tensor_parallel_size"

SPLIT_MODELS = frozenset(
    ("gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "qwen2", "qwen3")
)
"""Model types (transformers 5.17) whose layers vLLM splits in a way that the trainer supports.
These models have separate q, k, v, o, gate, up and down projections, are split by whole heads, and
are not mixtures of experts. tests/engine/test_engine_tensor_parallel.py checks the list.
"""

ELEMENTWISE = frozenset(("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop", "adagrad"))
"""Optimizers that update each value of a tensor independently of the other values. Updating a part
of a tensor therefore gives the same values as updating the whole tensor.
"""

SLICED_INITS = (True, False, "gaussian")
"""Values of init_lora_weights for which the adapter does not depend on the base weights. Each
process can draw the initial values of the whole adapter and keep its part of them.
"""

VOCABULARY_PADDING = 64
"""vLLM pads the vocabulary to a multiple of this number before it splits it (0.25.1 to 0.31.0)."""


def parallel_size(value: object) -> int:
    """Return ``value``, a tensor_parallel_size, as a number. "auto" counts as 1 until it is
    resolved.
    """
    return value if isinstance(value, int) else 1


def count_replicas(world_size: int, size: Any) -> int:
    """Return the number of replicas. The run has ``world_size`` processes, and each replica has
    ``size`` processes. Return ``world_size`` if ``size`` does not divide it, or if ``size`` is
    still "auto".
    """
    number = parallel_size(size)
    return world_size // number if number > 0 and world_size % number == 0 else world_size


def shape_problem(config: Mapping[str, Any], size: int) -> str | None:
    """Return the reason why a model cannot be split over ``size`` GPUs; None if it can. ``config``
    is the content of the model's config.json.
    """
    text_config = get_text_config(config)
    heads = _positive_integer(text_config, "num_attention_heads")
    kv_heads = _positive_integer(text_config, "num_key_value_heads") or heads
    intermediate_size, vocabulary = (
        _positive_integer(text_config, "intermediate_size"),
        _positive_integer(text_config, "vocab_size"),
    )
    if heads is not None and heads % size:
        return f"{size} does not divide the model's {heads} attention heads"
    if kv_heads is not None and kv_heads % size and size % kv_heads:
        return f"{size} neither divides the model's {kv_heads} KV heads nor is a multiple of them"
    if intermediate_size is not None and intermediate_size % size:
        return f"{size} does not divide the model's intermediate_size {intermediate_size}"
    if vocabulary is not None:
        padded = -(-vocabulary // VOCABULARY_PADDING) * VOCABULARY_PADDING
        if padded % size:
            return f"{size} does not divide the padded vocabulary {padded}"
        if padded // size * (size - 1) >= vocabulary:
            return (
                f"with {size} GPUs, the last GPU would get no part of the vocabulary of "
                f"{vocabulary} tokens"
            )
    return None


def model_problem(config: Mapping[str, Any]) -> str | None:
    """Return the reason why a model can never be split over several GPUs, whatever their number.
    Return None if there is no such reason. ``config`` is the content of the model's config.json.
    """
    text_config = get_text_config(config)
    model_type = str(text_config.get("model_type") or config.get("model_type") or "")
    if has_experts(dict(text_config)):
        return "the trainer cannot split a mixture of experts in the way in which vLLM splits it"
    if model_type not in SPLIT_MODELS:
        supported = ", ".join(sorted(SPLIT_MODELS))
        return f"the trainer cannot split the model type {model_type!r}, only {supported}"
    if config.get("quantization_config"):
        return "the checkpoint has quantized weights, which the trainer cannot split"
    return None


def possible_sizes(config: Mapping[str, Any] | None, world_size: int) -> list[int]:
    """Return the values that tensor_parallel_size "auto" can have, in ascending order. ``config``
    is the content of the model's config.json, or None if the model is not on this machine.
    """
    divisors = [number for number in range(1, world_size + 1) if world_size % number == 0]
    if config is None:
        return divisors
    if model_problem(config) is not None:
        return [1]
    return [number for number in divisors if number == 1 or shape_problem(config, number) is None]


def _positive_integer(text_config: Mapping[str, Any], name: str) -> int | None:
    value = text_config.get(name)
    return value if type(value) is int and value > 0 else None
