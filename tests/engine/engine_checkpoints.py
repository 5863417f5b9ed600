"""Create small random checkpoints of every family: 2 layers, hidden size 128, and a word-level
tokenizer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

if TYPE_CHECKING:
    from pathlib import Path

VOCAB = 211  # not a multiple of 64: the engine pads it

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "smollm": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 64, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 64, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2", {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 64}),
    "gemma3": ("Gemma3Text", {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 64}),
    "phi3": ("Phi3", {"tie_word_embeddings": False}),
    "olmo2": ("Olmo2", {"tie_word_embeddings": False}),
    "granite": (
        "Granite",
        {"logits_scaling": 4.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5},
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "head_dim": 64,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
        },
    ),
}

EXTRA_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {"gemma": ("Gemma", {"head_dim": 64})}
"""Families that only some tests create: gemma2 covers the same layers and more."""

MODEL_CLASSES = {"Gemma3Text": "Gemma3ForCausalLM"}


def make_checkpoint(folder: Path, family: str, **changes: Any) -> Path:
    """Write the checkpoint of ``family`` and its tokenizer into ``folder`` and return it."""
    class_stem, family_values = (FAMILIES | EXTRA_FAMILIES)[family]
    config = getattr(transformers, f"{class_stem}Config")(**(COMMON | family_values | changes))
    torch.manual_seed(0)
    model = getattr(transformers, MODEL_CLASSES.get(class_stem, f"{class_stem}ForCausalLM"))(config)
    # Norms and biases start as ones and zeros: random values make each tensor distinct.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.float().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_tokenizer() -> Any:
    """A word-level tokenizer: the word ``t17`` is token 17."""
    vocabulary = {f"t{i}": i for i in range(VOCAB)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="t3"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="t0", bos_token="t1", eos_token="t2"
    )
