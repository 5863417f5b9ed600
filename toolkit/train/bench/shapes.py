"""Create random checkpoints with the shapes of real models, because a speed benchmark needs no
trained weights.

The shapes are those of the published config.json files of Llama-3.2-1B, Llama-3.1-8B, Qwen3-4B and
Qwen2.5-32B.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

_LLAMA3: dict[str, Any] = {
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}


@dataclass(frozen=True, slots=True)
class Shape:
    """A model type of transformers and the keyword arguments of its config."""

    model_type: str
    config: dict[str, Any]


SHAPES: dict[str, Shape] = {
    "llama-1b": Shape(
        "llama",
        _LLAMA3
        | {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "tie_word_embeddings": True,
        },
    ),
    "llama-8b": Shape(
        "llama",
        _LLAMA3
        | {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": False,
        },
    ),
    "qwen3-4b": Shape(
        "qwen3",
        {
            "vocab_size": 151936,
            "max_position_embeddings": 40960,
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2.5-32b": Shape(
        "qwen2",
        {
            "vocab_size": 152064,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "hidden_size": 5120,
            "intermediate_size": 27648,
            "num_hidden_layers": 64,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": False,
        },
    ),
    "tiny": Shape(
        "llama",
        {
            "vocab_size": 512,
            "max_position_embeddings": 1024,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "tie_word_embeddings": True,
        },
    ),
}

CPU_SHAPE = "tiny"
"""The shape for a machine without a GPU."""


def make_checkpoint(name: str, folder: Path, *, seed: int = 0) -> Path:
    """Write a checkpoint with random weights of the shape ``name``, and a word-level tokenizer, to
    ``folder``.

    The weights are bfloat16 on a GPU, float32 on the CPU. If the folder already has a checkpoint of
    this shape, it is kept, so that all arms use the same checkpoint.
    """
    import torch  # noqa: PLC0415 - heavy
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415 - heavy

    stamp = folder / "bench-shape.json"
    stamp_text = json.dumps({"shape": name, "seed": seed, "config": SHAPES[name].config})
    if stamp.is_file() and stamp.read_text() == stamp_text:
        return folder
    shape = SHAPES[name]
    folder.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.for_model(
        shape.model_type, bos_token_id=1, eos_token_id=2, pad_token_id=0, **shape.config
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    _tokenizer(config.vocab_size).save_pretrained(folder)
    stamp.write_text(stamp_text)
    return folder


def _tokenizer(vocab_size: int) -> Any:
    """Return a tokenizer whose vocabulary has one word per token id (``t4`` .. ``tN``). So the
    number of words of a text is its number of tokens.

    No word is equal to a special token or begins with one. The tokenizer first cuts special tokens
    out of a text and then splits the rest into words, so it would split such a word.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: PLC0415 - heavy
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415 - heavy

    special = ("<pad>", "<s>", "</s>", "<unk>")
    words = {word: index for index, word in enumerate(special)}
    words |= {f"t{index}": index for index in range(len(special), vocab_size)}
    word_tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    word_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
