"""Small trainers for tests: the untrained model of the demo with an adapter, and rewards."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from transformers import PrinterCallback
from trl import GRPOConfig

from toolkit.engine.hf_engine import TransformersEngine
from toolkit.policy.lora import add_lora
from toolkit.policy.lora_settings import LoraSettings
from toolkit.train.demo import make_model, make_tokenizer
from toolkit.train.trainer import GRPOTrainer

if TYPE_CHECKING:
    from pathlib import Path

ROWS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10, 14) for b in range(10, 16)]


def ones(completions: list[str], **_: Any) -> list[float]:
    """The share of the digit 1. It differs between completions from the first step on."""
    return [c.count("1") / max(1, len(c)) for c in completions]


def short(completions: list[str], **_: Any) -> list[float]:
    return [1.0 / (1 + len(c)) for c in completions]


def make_policy(**settings: Any) -> Any:
    torch.set_num_threads(1)
    model = make_model(7)
    values = {"r": 4, "lora_alpha": 8, "target_modules": ("q_proj", "v_proj"), "random_state": 5}
    return add_lora(model, LoraSettings(**{**values, **settings}))


def put_engine(model: Any, tokenizer: Any) -> TransformersEngine:
    """Set a TransformersEngine on the model, as FastLanguageModel sets an engine of vLLM."""
    engine = TransformersEngine(
        model, pad_id=tokenizer.pad_token_id, end_ids=[tokenizer.eos_token_id], tokenizer=tokenizer
    )
    model.toolkit_engine = engine
    return engine


def arguments(folder: Path, kind: type[GRPOConfig] = GRPOConfig, **grpo: Any) -> GRPOConfig:
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 5,
        "learning_rate": 1e-2,
        "report_to": [],
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 3,
    }
    return kind(**{**values, **grpo})


def make_trainer(
    folder: Path,
    *,
    engine: bool = False,
    rewards: Any = ones,
    kind: type[GRPOTrainer] = GRPOTrainer,
    lora: dict[str, Any] | None = None,
    eval_rows: Any = None,
    config: type[GRPOConfig] = GRPOConfig,
    **grpo: Any,
) -> GRPOTrainer:
    tokenizer = make_tokenizer()
    model = make_policy(**(lora or {}))
    if engine:
        put_engine(model, tokenizer)
    trainer = kind(
        model=model,
        reward_funcs=rewards,
        args=arguments(folder, config, **grpo),
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=None if eval_rows is None else Dataset.from_list(eval_rows),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def adapter_digest(trainer: GRPOTrainer) -> str:
    digest = hashlib.sha256()
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            digest.update(name.encode() + parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def history(trainer: GRPOTrainer) -> list[dict[str, Any]]:
    """The logged rows of the training steps, without times."""
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return [{k: v for k, v in row.items() if "time" not in k} for row in rows]
