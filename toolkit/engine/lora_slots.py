"""Where the LoRA of a Hugging Face layer goes among the engine's layers with slots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.base.errors import UnsupportedError
from toolkit.engine.live_weights import engine_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def find_places(
    module: str, layers: Mapping[str, Any], packed: Mapping[str, Sequence[str]], vllm_module: Any
) -> list[tuple[Any, int]]:
    """Where the LoRA of the Hugging Face layer ``module`` goes: vLLM's layer and the index among
    its fused parts.

    Raises:
        UnsupportedError: vLLM has no layer with slots there, its model skips adapters under that
            name, or its latent attention reads the weight past the layer.
    """
    name = engine_name(vllm_module, module)
    for prefix in getattr(vllm_module, "lora_skip_prefixes", None) or ():
        if f".{prefix}" in name or name.startswith(prefix):
            raise UnsupportedError(
                f"vLLM skips adapters under {prefix!r} for this model ({module})",
                where="lora.target_modules",
            )
    parent, _, leaf = name.rpartition(".")
    if leaf == "kv_b_proj" and hasattr(vllm_module.get_submodule(parent), "mla_attn"):
        # There are slots, and an adapter in them changes nothing: vLLM keeps the layer as it was
        # before LoRA for prompts, and its weight as W_UK and W_UV for every token after.
        raise UnsupportedError(
            f"vLLM's latent attention ignores an adapter on {module}",
            where="lora.target_modules",
            fix="leave kv_b_proj out of target_modules, or train with fast_inference: false",
        )
    for fused, parts in packed.items():
        if leaf in parts and len(parts) > 1:
            layer = layers.get(f"{parent}.{fused}" if parent else fused)
            if layer is not None:
                return [(layer, list(parts).index(leaf))]
    layer = layers.get(name)
    if layer is None or not hasattr(layer, "lora_a_stacked"):
        raise UnsupportedError(
            f"the engine has no LoRA slot for {module}",
            where="lora.target_modules",
            fix="leave it out of target_modules, or train with fast_inference: false",
        )
    return [(layer, part) for part in range(len(layer.lora_a_stacked))]
