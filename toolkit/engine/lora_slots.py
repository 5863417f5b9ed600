"""Map a Hugging Face layer with LoRA to the engine's layer with slots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.base.errors import UnsupportedError
from toolkit.engine.live_weights import engine_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def find_places(
    module: str, layers: Mapping[str, Any], packed: Mapping[str, Sequence[str]], vllm_module: Any
) -> list[tuple[Any, int]]:
    """The slot for the LoRA of the Hugging Face layer ``module``: vLLM's layer and the index among
    its fused parts.

    Raises:
        UnsupportedError: vLLM has no layer with slots there, its model skips adapters under that
            name, or its latent attention bypasses the layer.
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
        # The slots exist, but an adapter in them has no effect: vLLM uses the layer without LoRA
        # for prompts, and copies of its weight (W_UK and W_UV) for later tokens.
        raise UnsupportedError(
            f"vLLM's latent attention ignores an adapter on {module}",
            where="lora.target_modules",
            fix="remove kv_b_proj from target_modules, or train with fast_inference: false",
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
            fix="remove it from target_modules, or train with fast_inference: false",
        )
    return [(layer, part) for part in range(len(layer.lora_a_stacked))]
