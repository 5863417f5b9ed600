"""Decide which layers of a model get a LoRA adapter. This module defines the default layers, and
PEFT's rules for names and patterns of modules.

In a mixture of experts, only the attention layers get an adapter by default. Adapters on routed
experts are not supported, because the engine would need LoRA slots there. (A LoRA slot is memory
that the engine reserves at a linear layer for an adapter.) These slots would use gigabytes: 3.1 GiB
at rank 32 on Qwen3-30B-A3B.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, TypeVar

from toolkit.config.run_config import SEVEN_PROJECTIONS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_Value = TypeVar("_Value")
ATTENTION_PROJECTIONS = SEVEN_PROJECTIONS[:4]
MLP_PROJECTIONS = SEVEN_PROJECTIONS[4:]
# The layers that get LoRA slots in the engine by default, under vLLM's names (q_b_proj is the query
# projection of multi-head latent attention). Without this list, vLLM would also reserve slots on
# the embeddings, the head and the experts. These slots would cost memory, and time for every token.
SLOT_LAYERS = (*SEVEN_PROJECTIONS, "qkv_proj", "gate_up_proj", "q_b_proj")
# Model types whose checkpoints store fused layers, and the names of their layers (transformers
# 5.17).
FUSED_LAYERS = {"phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")}
MAX_PATTERN_LENGTH, MAX_PATTERN_GROUPS = 1000, 10
EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# Model types for which PEFT applies the names gate_proj, up_proj and down_proj to the experts
# (transformers' conversion "qwen2_moe"; PEFT 0.21.2, utils/transformers_weight_conversion.py).
STACKED_EXPERT_TYPES = ("qwen3_moe", "qwen3_next", "deepseek_v2", "deepseek_v3")
# The layers of an expert that transformers stores as one parameter. PEFT adapts both or neither.
FUSED_EXPERT_LAYERS = ("gate_proj", "up_proj")


def get_text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings of the language model in a config.json. In a multimodal model, the fields
    of text_config replace the fields at the top level.
    """
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, dict) else config


def has_experts(config: Mapping[str, Any]) -> bool:
    """Whether a model is a mixture of experts. ``config`` is the content of its config.json, or its
    Hugging Face config as a dict.

    The number of experts must be above 1, because the configs of some dense models state one expert
    (Hunyuan, Jamba). Some configs list the number for each layer.
    """
    text = get_text_config(config)
    return any(_largest_count(text.get(name)) > 1 for name in EXPERT_COUNT_KEYS)


def _largest_count(counts: Any) -> int:
    """Return the largest integer in ``counts``; 0 if there is none. ``counts`` is an integer or a
    list of integers.
    """
    listed = counts if isinstance(counts, list) else [counts]
    return max((count for count in listed if isinstance(count, int)), default=0)


def default_targets(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the layers that get an adapter if ``lora.target_modules`` is "auto". ``config`` is the
    content of the model's config.json.

    In a dense model, these are the projections of attention and MLP. In a mixture of experts, these
    are only the projections of attention. In a mixture of experts with multi-head latent attention
    (DeepSeek), these are only the query and output projections, because the engine's attention
    kernel computes keys and values itself.
    """
    text = get_text_config(config)
    if not has_experts(text):
        return FUSED_LAYERS.get(str(text.get("model_type")), SEVEN_PROJECTIONS)
    if text.get("kv_lora_rank"):
        return ("q_b_proj" if text.get("q_lora_rank") else "q_proj", "o_proj")
    return ATTENTION_PROJECTIONS


def pattern_fault(text: str) -> str | None:
    """Return the reason why ``text`` cannot be used as a regular expression; None if it can."""
    if len(text) > MAX_PATTERN_LENGTH:
        return f"the pattern is longer than {MAX_PATTERN_LENGTH} characters"
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        return f"not a regular expression: {error}"
    if re.search(r"[*+}]\)*[*+{]", text) or text.count("(") >= MAX_PATTERN_GROUPS:
        return (
            "the pattern has a repetition inside a repetition or too many groups, so that matching "
            "could take very long"
        )
    return None


def pattern_value(pattern: Mapping[str, _Value], module: str, default: _Value) -> _Value:
    """Return the value that ``pattern`` (a ``rank_pattern`` or ``alpha_pattern``) has for a module.
    Return ``default`` if no key of ``pattern`` matches. Each key is a regular expression, which
    must match the full name of the module, or everything after one of the dots in the name. The
    first matching key decides, as in PEFT 0.21.2 (``get_pattern_key``).
    """
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def is_excluded(exclude: Iterable[str] | str | None, module: str) -> bool:
    """Whether ``exclude``, the value of ``exclude_modules``, excludes ``module``. The rules are
    those of PEFT.
    """
    if not exclude:
        return False
    if isinstance(exclude, str):
        return re.fullmatch(exclude, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in exclude)


def expert_targets(model_type: str, targets: Iterable[str] | str) -> frozenset[str]:
    """Return the names in ``targets`` that PEFT applies only to the stacked experts of the model.
    These can be gate_proj, up_proj and down_proj. PEFT does not apply the returned names to dense
    layers and shared experts. The set is empty if PEFT does not stack the experts of this
    ``model_type``.
    """
    if model_type not in STACKED_EXPERT_TYPES:
        return frozenset()
    if isinstance(targets, str):
        if targets == "all-linear":
            return frozenset(MLP_PROJECTIONS)
        if pattern_fault(targets) is not None:
            return frozenset()
        path = "model.layers.0.mlp.experts."
        return frozenset(name for name in MLP_PROJECTIONS if re.fullmatch(targets, path + name))
    last_parts = {target.rpartition(".")[2] for target in targets}
    return frozenset(name for name in MLP_PROJECTIONS if name in last_parts)


def layers_beyond(layers: Any, count: int | None) -> tuple[int, ...]:
    """Return the layer indices in ``layers`` that do not exist in a model with ``count`` layers."""
    if count is None or layers is None:
        return ()
    listed = (layers,) if isinstance(layers, int) else tuple(layers)
    return tuple(layer for layer in listed if not 0 <= layer < count)
