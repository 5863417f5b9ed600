"""Decide which layers get an adapter: the default for a model, and the meaning of the names in a
mixture of experts.

The engine's LoRA slots are on linear layers. vLLM's slots on routed experts take gigabytes (3.1 GiB
at rank 32 on Qwen3-30B-A3B), and the toolkit does not send adapters to them. So the default for a
mixture of experts is its attention.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, TypeVar

from toolkit.config.run_config import SEVEN_PROJECTIONS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_Value = TypeVar("_Value")
ATTENTION = SEVEN_PROJECTIONS[:4]
MLP = SEVEN_PROJECTIONS[4:]
# The layers that get LoRA slots in the engine by default, under vLLM's names (q_b_proj is the query
# of multi-head latent attention). Without this list vLLM also adds slots to embeddings, the head
# and experts, which costs memory, and time for every token.
SLOTS = (*SEVEN_PROJECTIONS, "qkv_proj", "gate_up_proj", "q_b_proj")
# Types of checkpoints that store fused layers (transformers 5.17).
FUSED = {"phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")}
LONGEST_PATTERN, MOST_GROUPS = 1000, 10
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# Families whose experts PEFT adapts under the names of the MLP (transformers' conversion
# "qwen2_moe"; PEFT 0.21.2, utils/transformers_weight_conversion.py).
EXPERT_CONVERTED = ("qwen3_moe", "qwen3_next", "deepseek_v2", "deepseek_v3")
# The layers of an expert that transformers stores as one parameter. PEFT adapts both or neither.
FUSED_EXPERT = ("gate_proj", "up_proj")


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json that describes the language model."""
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, dict) else config


def has_experts(config: Mapping[str, Any]) -> bool:
    """Whether a config.json, or a Hugging Face config as a dict, is of a mixture of experts.

    A model with one expert is not a mixture: dense models of some families have this count
    (Hunyuan, Jamba). Some configs list the count for each layer.
    """
    text = text_part(config)
    return any(_most(text.get(name)) > 1 for name in EXPERTS)


def _most(counts: Any) -> int:
    """The largest integer in ``counts``, which is an integer or a list of integers; else 0."""
    listed = counts if isinstance(counts, list) else [counts]
    return max((count for count in listed if isinstance(count, int)), default=0)


def default_targets(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What ``lora.target_modules: auto`` means for the model of this config.json: the projections
    of attention and MLP, or only of attention for a mixture of experts.

    With latent attention (DeepSeek) it is the query and output projections, because keys and values
    are folded into the engine's attention kernel.
    """
    text = text_part(config)
    if not has_experts(text):
        return FUSED.get(str(text.get("model_type")), SEVEN_PROJECTIONS)
    if text.get("kv_lora_rank"):
        return ("q_b_proj" if text.get("q_lora_rank") else "q_proj", "o_proj")
    return ATTENTION


def pattern_fault(text: str) -> str | None:
    """Why a text is not usable as a regular expression; None if it is."""
    if len(text) > LONGEST_PATTERN:
        return f"longer than {LONGEST_PATTERN} characters"
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        return f"not a regular expression: {error}"
    if re.search(r"[*+}]\)*[*+{]", text) or text.count("(") >= MOST_GROUPS:
        return "a repetition inside a repetition could take very long"
    return None


def pattern_value(pattern: Mapping[str, _Value], module: str, default: _Value) -> _Value:
    """The value that ``rank_pattern`` or ``alpha_pattern`` has for a module: that of the first key
    that equals the end of its name or matches it as a regular expression (PEFT 0.21.2,
    ``get_pattern_key``).
    """
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def is_excluded(exclude: Iterable[str] | str | None, module: str) -> bool:
    """Whether ``exclude_modules`` names a module, by PEFT's rules."""
    if not exclude:
        return False
    if isinstance(exclude, str):
        return re.fullmatch(exclude, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in exclude)


def expert_targets(model_type: str, targets: Iterable[str] | str) -> frozenset[str]:
    """The names among gate_proj, up_proj and down_proj that PEFT applies to the stacked experts of
    this family.

    Then these names do not mean the modules of dense and shared layers.
    """
    if model_type not in EXPERT_CONVERTED:
        return frozenset()
    if isinstance(targets, str):
        if targets == "all-linear":
            return frozenset(MLP)
        if pattern_fault(targets) is not None:
            return frozenset()
        path = "model.layers.0.mlp.experts."
        return frozenset(name for name in MLP if re.fullmatch(targets, path + name))
    ends = {target.rpartition(".")[2] for target in targets}
    return frozenset(name for name in MLP if name in ends)
