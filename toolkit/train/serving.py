"""The command that serves the model of a run with plain vLLM."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from toolkit.config.lora_ranks import LEGAL_RANKS, smallest_rank

if TYPE_CHECKING:
    from pathlib import Path

    from toolkit.config.run_config import RunConfig


def serve_arguments(config: RunConfig, folder: Path, *, merged: bool = False) -> list[str]:
    """The arguments of ``vllm serve`` for the exported run of ``config`` in ``folder``. The adapter
    is served as a model with the name of its folder.
    """
    model = config.model
    words = ["vllm", "serve", str(folder) if merged else model.model_name]
    if not merged and model.revision is not None:
        words += ["--revision", model.revision]
    if model.max_seq_length is not None:
        words += ["--max-model-len", str(model.max_seq_length)]
    if model.dtype != "auto" and not merged:
        words += ["--dtype", model.dtype]
    if model.trust_remote_code:
        words.append("--trust-remote-code")
    if merged:
        return words
    if model.load_in_4bit:
        words += ["--quantization", "bitsandbytes"]
    rank = smallest_rank(config.lora.largest_rank) or config.lora.largest_rank
    words += ["--enable-lora", "--max-lora-rank", str(rank)]
    return [*words, "--lora-modules", f"{folder.resolve().name}={folder}"]


def serve_line(config: RunConfig, folder: Path, *, merged: bool = False) -> str:
    """The command as text, or the reason why plain vLLM does not support this adapter."""
    why = None if merged else not_served(config)
    if why is not None:
        return f"plain vLLM does not support this adapter ({why}): export it with --merge"
    return shlex.join(serve_arguments(config, folder, merged=merged))


def not_served(config: RunConfig) -> str | None:
    """A feature of the adapter that vLLM's LoRA does not support; None if there is none."""
    lora = config.lora
    if lora.use_dora:
        return "DoRA"
    if lora.bias != "none":
        return f"bias: {lora.bias}"
    if lora.modules_to_save:
        return f"modules_to_save: {', '.join(lora.modules_to_save)}"
    if smallest_rank(lora.largest_rank) is None:
        return f"rank {lora.largest_rank}, above {LEGAL_RANKS[-1]}"
    return None
