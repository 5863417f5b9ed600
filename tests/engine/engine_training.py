"""Helpers for GRPO on a small engine: load a model with an engine, add a temporary adapter, and
make a trainer.
"""

from __future__ import annotations

import hashlib
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset

from toolkit import FastLanguageModel, GRPOTrainer

sys.path.append(str(Path(__file__).resolve().parents[1] / "fixtures"))
sys.path.append(str(Path(__file__).resolve().parents[1] / "unit" / "train"))
from trainer_helpers import arguments

if TYPE_CHECKING:
    from collections.abc import Iterator

ROWS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(2, 6) for b in range(3, 6)]


def digit_reward(completions: list[str], **_: Any) -> list[float]:
    """The share of digits, which differs between completions from the first step on."""
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]


def short_reward(completions: list[str], **_: Any) -> list[float]:
    return [1.0 / (1 + len(text)) for text in completions]


def load_with_engine(folder: Path, **engine_arguments: Any) -> tuple[Any, Any]:
    """Load a checkpoint; return (model with its engine, tokenizer)."""
    values = {
        "max_seq_length": 96,
        "load_in_4bit": False,
        "fast_inference": True,
        "max_lora_rank": 8,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 512,
        "kv_cache_bytes": 1 << 26,
    }
    return FastLanguageModel.from_pretrained(str(folder), **{**values, **engine_arguments})


@contextmanager
def temporary_adapter(base: Any, **settings: Any) -> Iterator[Any]:
    """``base`` with a new adapter, which is removed at the end."""
    values = {"r": 4, "lora_alpha": 8, "use_gradient_checkpointing": False, "random_state": 5}
    policy = FastLanguageModel.get_peft_model(base, **{**values, **settings})
    try:
        yield policy
    finally:
        policy.unload()


def make_trainer(
    policy: Any,
    tokenizer: Any,
    folder: Path,
    *,
    rows: Any = None,
    trainer_arguments: Any = None,
    **grpo: Any,
) -> GRPOTrainer:
    """A trainer with ``trainer_arguments`` (reward_funcs, tools, eval_dataset); ``grpo`` are the
    fields of its GRPOConfig.
    """
    values = {"max_steps": 2, "max_completion_length": 8, **grpo}
    return GRPOTrainer(
        model=policy,
        args=arguments(folder, **values),
        train_dataset=Dataset.from_list(ROWS if rows is None else rows),
        processing_class=tokenizer,
        **{"reward_funcs": digit_reward, **(trainer_arguments or {})},
    )


def logged_steps(trainer: Any) -> list[dict[str, Any]]:
    """The logged metrics of each training step, without times."""
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return [{k: v for k, v in row.items() if "time" not in k} for row in rows]


def adapter_checksum(policy: Any) -> str:
    """A checksum of the trained tensors."""
    digest = hashlib.sha256()
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            digest.update(name.encode() + parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def engine_checksums(engine: Any) -> dict[str, str]:
    """A checksum of every tensor of the engine's model, except the adapter slots."""
    tensors = {**dict(engine.module.named_parameters()), **dict(engine.module.named_buffers())}
    return {
        name: hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()
        for name, tensor in tensors.items()
        if "lora_" not in name and isinstance(tensor, torch.Tensor)
    }
