"""The formats of prime-rl: the TOML file of ``rl``, and the separate files of its trainer,
orchestrator and inference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.config.importers.common import (
    NO_ADAPTER,
    dtype,
    fit_length,
    is_count,
    positive,
    renamed,
    targets,
    whole_batch,
)
from toolkit.config.importers.mapping import Default, Row, Table, left, refused

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toolkit.config.importers.mapping import Translation

_APART = "sampling and training are one process here, on the same cards, on the newest adapter"
_SPREAD = "every GPU has the whole model; several GPUs work data-parallel (--nproc-per-node)"
_TRACKER = "a run writes metrics.jsonl and a report; grpo.report_to names a tracker"
_LOSS = (
    "prime-rl's loss masks tokens by its own bounds; see grpo.loss_type and the keys of "
    "grpo.vllm_importance_sampling_*"
)
_ENVIRONMENT = "an environment of verifiers"


def _schedule(value: Any) -> Any:
    return renamed(value, {"constant": "constant_with_warmup"})


def _optimizer(value: Any) -> Any:
    return renamed(value, {"adamw": "adamw_torch", "sgd": "sgd"})


def _checkpointing(value: Any) -> bool:
    return value is not None and value is not False


def _model(prefix: str) -> Iterator[Row]:
    """The rows of a [model] table: of the whole file, of the trainer, or of the orchestrator."""
    yield Row(f"{prefix}model.name", "model.model_name")
    yield Row(f"{prefix}model.trust_remote_code", "model.trust_remote_code")
    yield Row(f"{prefix}model.seq_len", "model.max_seq_length")
    yield Row(f"{prefix}model.max_model_len", "model.max_seq_length")
    yield Row(f"{prefix}model.attn", "model.attn_implementation")
    yield Row(f"{prefix}model.dtype", "model.dtype", convert=dtype)
    yield Row(f"{prefix}model.enforce_eager", "model.enforce_eager")
    yield Row(f"{prefix}model.ac", "lora.use_gradient_checkpointing", convert=_checkpointing)
    yield Row(f"{prefix}model.lora.rank", "lora.r")
    yield Row(f"{prefix}model.lora.alpha", "lora.lora_alpha")
    yield Row(f"{prefix}model.lora.dropout", "lora.lora_dropout")
    yield Row(f"{prefix}model.lora.target_modules", "lora.target_modules", convert=targets)
    yield Row(f"{prefix}model.lora.modules_to_save", "lora.modules_to_save")
    yield Row(f"{prefix}model.experimental.lora.rank", "lora.r")
    yield Row(f"{prefix}model.experimental.lora.alpha", "lora.lora_alpha")
    yield from left("the loader chooses", f"{prefix}model.*")


def _training(prefix: str) -> Iterator[Row]:
    yield from _model(prefix)
    yield Row(f"{prefix}optim.lr", "grpo.learning_rate")
    yield Row(f"{prefix}optim.weight_decay", "grpo.weight_decay")
    yield Row(f"{prefix}optim.max_norm", "grpo.max_grad_norm")
    yield Row(f"{prefix}optim.betas1", "grpo.adam_beta1")
    yield Row(f"{prefix}optim.betas2", "grpo.adam_beta2")
    yield Row(f"{prefix}optim.type", "grpo.optim", convert=_optimizer)
    yield Row(f"{prefix}scheduler.type", "grpo.lr_scheduler_type", convert=_schedule)
    yield Row(f"{prefix}scheduler.warmup_steps", "grpo.warmup_steps")
    yield from left("the scheduler's own", f"{prefix}scheduler.*", f"{prefix}optim.*")
    yield from refused(_LOSS, f"{prefix}loss.*")
    yield from left(_SPREAD, f"{prefix}dist_timeout_seconds", f"{prefix}weight_broadcast.*",
                    f"{prefix}tokenizer.*", f"{prefix}data.*")  # fmt: skip


def _sampling(prefix: str) -> Iterator[Row]:
    yield Row(f"{prefix}sampling.max_tokens", "grpo.max_completion_length")
    yield Row(f"{prefix}sampling.max_completion_tokens", "grpo.max_completion_length")
    yield Row(f"{prefix}sampling.temperature", "grpo.temperature")
    yield Row(f"{prefix}sampling.repetition_penalty", "grpo.repetition_penalty")
    yield Row(f"{prefix}sampling.top_p", "grpo.top_p")
    yield Row(f"{prefix}sampling.top_k", "grpo.top_k")
    yield Row(f"{prefix}sampling.min_p", "grpo.min_p")
    yield Row(f"{prefix}sampling.min_tokens", "grpo.generation_kwargs.min_tokens", convert=positive)
    yield from left("draws are seeded by grpo.seed", f"{prefix}sampling.seed")
    yield from refused("the temperature is constant here", f"{prefix}sampling.temp_scheduler.*")
    yield from refused("the engine takes grpo.generation_kwargs", f"{prefix}sampling.extra_body")
    yield from left("the sampler's own", f"{prefix}sampling.*")


def _rollouts(prefix: str) -> Iterator[Row]:
    yield Row(f"{prefix}batch_size", "grpo.generation_batch_size")
    yield Row(f"{prefix}rollouts_per_example", "grpo.num_generations")
    yield Row(f"{prefix}group_size", "grpo.num_generations")
    yield Row(f"{prefix}seq_len", "model.max_seq_length")
    yield Row(f"{prefix}seed", "grpo.seed")
    yield Row(f"{prefix}mask_truncated_completions", "grpo.mask_truncated_completions")
    yield from left("micro-batches are cut by the sizer", f"{prefix}micro_batch_size")
    yield from _sampling(prefix)
    yield from _sampling(f"{prefix}train.")
    for place in ("env", "environment", "train.env"):
        name = f"{prefix}{place}"
        yield from refused(_ENVIRONMENT, f"{name}.id", f"{name}.args", f"{name}.taskset",
                           f"{name}.harness")  # fmt: skip
        yield from left("see its id", f"{name}.*")
    yield from left(_APART, f"{prefix}max_async_level", f"{prefix}async_level", f"{prefix}client.*",
                    f"{prefix}oversampling_factor", f"{prefix}num_train_workers",
                    f"{prefix}max_off_policy_steps", f"{prefix}renderer.*",
                    f"{prefix}tasks_per_minute", f"{prefix}max_concurrent")  # fmt: skip
    yield Row(f"{prefix}buffer.online_difficulty_filtering", "grpo.dynamic_sampling")
    pools = (f"{prefix}buffer.{name}_threshold" for name in ("easy", "hard"))
    yield from refused("grpo.curriculum chooses by the spread of rewards, not by limits", *pools)
    yield from left("prompts are drawn by grpo.seed", f"{prefix}buffer.*")
    yield from left("held-out data is named in dataset.eval_path", f"{prefix}eval.*",
                    f"{prefix}val.*")  # fmt: skip
    yield from left(_TRACKER, f"{prefix}wandb.*", f"{prefix}log.*", f"{prefix}monitor.*",
                    f"{prefix}prime_monitor.*")  # fmt: skip


def _finish(made: Translation) -> None:
    if "lora.r" not in made.written:
        made.notes.append(f"There is no model.lora in the file: {NO_ADAPTER}")
    total = made.get("grpo.generation_batch_size")
    if is_count(total):
        whole_batch(made, total, made.written["grpo.generation_batch_size"].why)
    made.notes.append(
        "prime-rl takes its data and rewards from an environment of verifiers: write dataset and "
        "reward, or the section environment"
    )
    fit_length(made)


def _once(rows: Iterator[Row]) -> tuple[Row, ...]:
    found: dict[str, Row] = {}
    for row in rows:
        found.setdefault(row.old, row)
    return tuple(found.values())


def _rows() -> Iterator[Row]:
    yield Row("max_steps", "grpo.max_steps")
    yield Row("output_dir", "runtime.output_dir")
    yield Row("ckpt.interval", "grpo.save_steps")
    yield Row("ckpt.keep_last", "runtime.keep_last")
    for prefix in ("", "trainer.", "orchestrator."):
        why = "checkpoints are written by grpo.save_steps"
        yield from left(why, f"{prefix}ckpt", f"{prefix}ckpt.*")
    yield from _training("")
    yield from _training("trainer.")
    yield from _rollouts("")
    yield from _model("orchestrator.")
    yield from _rollouts("orchestrator.")
    yield Row("trainer.max_steps", "grpo.max_steps")
    yield Row("orchestrator.max_steps", "grpo.max_steps")
    yield Row("inference.model.max_model_len", "model.max_seq_length")
    yield Row("inference.model.enforce_eager", "model.enforce_eager")
    yield Row(
        "inference.gpu_memory_utilization", None, "it is sized for what trains beside it here"
    )
    yield from left(_APART, "inference", "inference.*", "deployment.*", "trainer", "trainer.*",
                    "orchestrator", "inference_gpu_ids", "trainer_gpu_ids", "weight_broadcast.*",
                    "async_level", "clean", "bench", "slurm.*", "experimental.*")  # fmt: skip


TABLE = Table(
    form="prime-rl",
    title="prime-rl",
    rows=_once(_rows()),
    defaults=(
        Default("grpo.lr_scheduler_type", "constant", "prime-rl's default"),
        Default("grpo.weight_decay", 0.01, "prime-rl's default"),
    ),
    finish=_finish,
)
