"""The table of prime-rl's keys and of the run file keys that replace them. The formats are the TOML
file of the command ``rl``, and the separate files of the trainer, the orchestrator and the
inference server.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.config.importers.common import (
    NO_ADAPTER,
    convert_dtype,
    convert_targets,
    is_positive_integer,
    new_name,
    positive_or_none,
    set_batch_size,
    set_sequence_length,
)
from toolkit.config.importers.mapping import Default, Row, Table, omit, refused

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toolkit.config.importers.mapping import Translation

_APART = (
    "one process samples and trains here, on the same GPUs, and always samples with the newest "
    "adapter"
)
_SPREAD = (
    "every GPU has a complete copy of the model; several GPUs train data-parallel "
    "(--nproc-per-node)"
)
_TRACKER = "a run always writes metrics.jsonl and a report; to use a tracker, set grpo.report_to"
_LOSS = (
    "prime-rl's loss masks tokens with its own bounds; similar settings are grpo.loss_type and "
    "grpo.vllm_importance_sampling_*"
)
_ENVIRONMENT = (
    "this is an environment of the library verifiers: write the section environment, or dataset "
    "and reward"
)


def _schedule(value: object) -> Any:
    return new_name(value, {"constant": "constant_with_warmup"})


def _optimizer(value: object) -> Any:
    return new_name(value, {"adamw": "adamw_torch", "sgd": "sgd"})


def _checkpointing(value: object) -> bool:
    return value is not None and value is not False


def _model(prefix: str) -> Iterator[Row]:
    """Yield the rows for the keys of a [model] table. ``prefix`` is put before each key. It
    is empty for the table [model], and for example ``trainer.`` for the table [trainer.model].
    """
    yield Row(f"{prefix}model.name", "model.model_name")
    yield Row(f"{prefix}model.trust_remote_code", "model.trust_remote_code")
    yield Row(f"{prefix}model.seq_len", "model.max_seq_length")
    yield Row(f"{prefix}model.max_model_len", "model.max_seq_length")
    yield Row(f"{prefix}model.attn", "model.attn_implementation")
    yield Row(f"{prefix}model.dtype", "model.dtype", convert=convert_dtype)
    yield Row(f"{prefix}model.enforce_eager", "model.enforce_eager")
    yield Row(f"{prefix}model.ac", "lora.use_gradient_checkpointing", convert=_checkpointing)
    yield Row(f"{prefix}model.lora.rank", "lora.r")
    yield Row(f"{prefix}model.lora.alpha", "lora.lora_alpha")
    yield Row(f"{prefix}model.lora.dropout", "lora.lora_dropout")
    yield Row(f"{prefix}model.lora.target_modules", "lora.target_modules", convert=convert_targets)
    yield Row(f"{prefix}model.lora.modules_to_save", "lora.modules_to_save")
    yield Row(f"{prefix}model.experimental.lora.rank", "lora.r")
    yield Row(f"{prefix}model.experimental.lora.alpha", "lora.lora_alpha")
    yield from omit(
        "the toolkit chooses this setting itself when it loads the model", f"{prefix}model.*"
    )


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
    yield from omit(
        "the default of the schedule or the optimizer is used",
        f"{prefix}scheduler.*",
        f"{prefix}optim.*",
    )
    yield from refused(_LOSS, f"{prefix}loss.*")
    yield from omit(_SPREAD, f"{prefix}dist_timeout_seconds", f"{prefix}weight_broadcast.*",
                    f"{prefix}tokenizer.*", f"{prefix}data.*")  # fmt: skip


def _sampling(prefix: str) -> Iterator[Row]:
    yield Row(f"{prefix}sampling.max_tokens", "grpo.max_completion_length")
    yield Row(f"{prefix}sampling.max_completion_tokens", "grpo.max_completion_length")
    yield Row(f"{prefix}sampling.temperature", "grpo.temperature")
    yield Row(f"{prefix}sampling.repetition_penalty", "grpo.repetition_penalty")
    yield Row(f"{prefix}sampling.top_p", "grpo.top_p")
    yield Row(f"{prefix}sampling.top_k", "grpo.top_k")
    yield Row(f"{prefix}sampling.min_p", "grpo.min_p")
    yield Row(
        f"{prefix}sampling.min_tokens",
        "grpo.generation_kwargs.min_tokens",
        convert=positive_or_none,
    )
    yield from omit("grpo.seed is the seed of sampling", f"{prefix}sampling.seed")
    yield from refused(
        "the temperature cannot change during a run", f"{prefix}sampling.temp_scheduler.*"
    )
    yield from refused(
        "set other sampling keywords in grpo.generation_kwargs", f"{prefix}sampling.extra_body"
    )
    yield from omit("the default of the engine is used", f"{prefix}sampling.*")


def _rollouts(prefix: str) -> Iterator[Row]:
    yield Row(f"{prefix}batch_size", "grpo.generation_batch_size")
    yield Row(f"{prefix}rollouts_per_example", "grpo.num_generations")
    yield Row(f"{prefix}group_size", "grpo.num_generations")
    yield Row(f"{prefix}seq_len", "model.max_seq_length")
    yield Row(f"{prefix}seed", "grpo.seed")
    yield Row(f"{prefix}mask_truncated_completions", "grpo.mask_truncated_completions")
    yield from omit(
        "the toolkit chooses the size of the micro-batches", f"{prefix}micro_batch_size"
    )
    yield from _sampling(prefix)
    yield from _sampling(f"{prefix}train.")
    for place in ("env", "environment", "train.env"):
        name = f"{prefix}{place}"
        yield from refused(_ENVIRONMENT, f"{name}.id", f"{name}.args", f"{name}.taskset",
                           f"{name}.harness")  # fmt: skip
        yield from omit("this setting belongs to the environment", f"{name}.*")
    yield from omit(_APART, f"{prefix}max_async_level", f"{prefix}async_level", f"{prefix}client.*",
                    f"{prefix}oversampling_factor", f"{prefix}num_train_workers",
                    f"{prefix}max_off_policy_steps", f"{prefix}renderer.*",
                    f"{prefix}tasks_per_minute", f"{prefix}max_concurrent")  # fmt: skip
    yield Row(f"{prefix}buffer.online_difficulty_filtering", "grpo.dynamic_sampling")
    pools = (f"{prefix}buffer.{name}_threshold" for name in ("easy", "hard"))
    yield from refused(
        "difficulty thresholds are not supported; grpo.curriculum chooses prompts by the spread "
        "of their rewards",
        *pools,
    )
    yield from omit("grpo.seed determines the order of the prompts", f"{prefix}buffer.*")
    yield from omit("set dataset.eval_path to the evaluation data", f"{prefix}eval.*",
                    f"{prefix}val.*")  # fmt: skip
    yield from omit(_TRACKER, f"{prefix}wandb.*", f"{prefix}log.*", f"{prefix}monitor.*",
                    f"{prefix}prime_monitor.*")  # fmt: skip


def _finish(translation: Translation) -> None:
    if "lora.r" not in translation.run_values:
        translation.notes.append(f"The file does not set model.lora, but {NO_ADAPTER}.")
    total = translation.get("grpo.generation_batch_size")
    if is_positive_integer(total):
        set_batch_size(translation, total, translation.run_values["grpo.generation_batch_size"].why)
    translation.notes.append(
        "prime-rl takes its data and rewards from an environment of the library verifiers. "
        "Write the sections `dataset` and `reward`, or the section `environment`."
    )
    set_sequence_length(translation)


def _unique_rows(rows: Iterator[Row]) -> tuple[Row, ...]:
    found: dict[str, Row] = {}
    for row in rows:
        found.setdefault(row.foreign_key, row)
    return tuple(found.values())


def _rows() -> Iterator[Row]:
    yield Row("max_steps", "grpo.max_steps")
    yield Row("output_dir", "runtime.output_dir")
    yield Row("ckpt.interval", "grpo.save_steps")
    yield Row("ckpt.keep_last", "runtime.keep_last")
    for prefix in ("", "trainer.", "orchestrator."):
        why = "grpo.save_steps sets when checkpoints are written"
        yield from omit(why, f"{prefix}ckpt", f"{prefix}ckpt.*")
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
        "inference.gpu_memory_utilization",
        None,
        "the engine shares the GPU with the trainer; use `envcheck size` to compute the value",
    )
    yield from omit(_APART, "inference", "inference.*", "deployment.*", "trainer", "trainer.*",
                    "orchestrator", "inference_gpu_ids", "trainer_gpu_ids", "weight_broadcast.*",
                    "async_level", "clean", "bench", "slurm.*", "experimental.*")  # fmt: skip


TABLE = Table(
    format_name="prime-rl",
    title="prime-rl",
    rows=_unique_rows(_rows()),
    defaults=(
        Default("grpo.lr_scheduler_type", "constant", "prime-rl's default"),
        Default("grpo.weight_decay", 0.01, "prime-rl's default"),
    ),
    finish=_finish,
)
