"""Turn a config.json into a Shape, with one small function per architecture family. ``FAMILIES``
maps each model_type to its function.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.sizing.families import dense, gemma, gemma4, hybrid, mla, moe, states

if TYPE_CHECKING:
    from collections.abc import Callable

    from toolkit.sizing.config_fields import Fields
    from toolkit.sizing.families.common import Shape

FAMILIES: dict[str, Callable[[Fields], Shape]] = {
    "llama": dense.llama,
    "mistral": dense.mistral,
    "ministral": dense.mistral,
    "qwen2": dense.qwen2,
    "qwen3": dense.qwen3,
    "smollm3": dense.smollm3,
    "granite": dense.granite,
    "olmo2": dense.olmo2,
    "olmo3": dense.olmo3,
    "phi3": dense.phi3,
    "gemma2": gemma.gemma2,
    "gemma3_text": gemma.gemma3_text,
    "gemma3": gemma.gemma3,
    "gemma4": gemma4.gemma4,
    "gemma4_text": gemma4.gemma4,
    "mixtral": moe.mixtral,
    "qwen3_moe": moe.qwen3_moe,
    "gpt_oss": moe.gpt_oss,
    "deepseek_v2": mla.deepseek,
    "deepseek_v3": mla.deepseek,
    "glm4_moe": moe.glm4_moe,
    "qwen3_next": hybrid.qwen3_next,
    "qwen3_5": hybrid.qwen3_5,
    "qwen3_5_text": hybrid.qwen3_5,
    "qwen3_5_moe": hybrid.qwen3_5_moe,
    "qwen3_5_moe_text": hybrid.qwen3_5_moe,
    "lfm2": states.lfm2,
    "nemotron_h": states.nemotron_h,
}
