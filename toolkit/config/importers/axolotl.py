"""The format of axolotl: YAML with ``base_model`` and ``rl: grpo`` (docs/grpo.qmd,
utils/schemas).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.config.importers.common import (
    NO_ADAPTER,
    dtype,
    fit_length,
    positive,
    renamed,
    split_warmup,
    targets,
)
from toolkit.config.importers.mapping import Row, Table, Unfit, later, left, refused, rows, trl_rows
from toolkit.config.importers.trl import rewards

if TYPE_CHECKING:
    from toolkit.config.importers.mapping import Translation

_ASYNC = "rollouts and training take turns here, on the newest adapter"
_TEXT = "the tokenizer's own settings are used"
_MEMORY = "every GPU has the whole model; several GPUs work data-parallel (--nproc-per-node)"
_TRACKER = "a run writes metrics.jsonl and a report; grpo.report_to names a tracker"


def _steps(value: Any) -> Any:
    """Convert axolotl's number of steps: a value below 1 is a fraction of an epoch."""
    if isinstance(value, float) and 0 < value < 1:
        raise Unfit("there it is a share of an epoch, here of the run: write steps")
    return value


def _optimizer(value: Any) -> Any:
    return renamed(value, {"adamw_hf": "adamw_torch", "adamw_bnb_8bit": "adamw_8bit"})


def _checkpointing(value: Any) -> Any:
    if isinstance(value, bool):
        return value
    return renamed(value, {"unsloth": "unsloth", "offload": "unsloth"}, True)


def _linear(value: Any) -> Any:
    return "all-linear" if value is True else None


def _eval_strategy(made: Translation) -> None:
    if "grpo.eval_steps" in made.written and "grpo.eval_strategy" not in made.written:
        made.write("grpo.eval_strategy", "steps", "eval_steps asks for it")


def _finish(made: Translation) -> None:
    rewards(made, "trl.reward_funcs")
    if "adapter" not in {entry.key for entry in made.foreign.entries}:
        made.notes.append(f"There is no adapter in the file: {NO_ADAPTER}")
    if made.value_of("adapter") == "qlora" and "model.load_in_4bit" not in made.written:
        made.write("model.load_in_4bit", True, "adapter: qlora")
    if made.value_of("rl") is None:
        made.notes.append("There is no rl: grpo in the file; was it another kind of training?")
    _eval_strategy(made)
    split_warmup(made)
    fit_length(made)


_TOP = (
    Row("base_model", "model.model_name"),
    Row("model_name_or_path", "model.model_name"),
    Row("revision_of_model", "model.revision"),
    Row("trust_remote_code", "model.trust_remote_code"),
    Row("sequence_len", "model.max_seq_length"),
    Row("load_in_4bit", "model.load_in_4bit"),
    Row("load_in_8bit", "model.load_in_8bit"),
    Row("torch_dtype", "model.dtype", convert=dtype),
    Row("attn_implementation", "model.attn_implementation"),
    *refused("this toolkit trains GRPO", "rl", off=("grpo",)),
    *refused(NO_ADAPTER, "adapter", off=("lora", "qlora")),
    Row("lora_r", "lora.r"),
    Row("lora_alpha", "lora.lora_alpha"),
    Row("lora_dropout", "lora.lora_dropout"),
    Row("lora_target_modules", "lora.target_modules", convert=targets),
    Row("lora_target_linear", "lora.target_modules", convert=_linear),
    Row("lora_modules_to_save", "lora.modules_to_save"),
    Row("lora_exclude_modules", "lora.exclude_modules"),
    Row("peft_layers_to_transform", "lora.layers_to_transform"),
    Row("peft_layers_pattern", "lora.layers_pattern"),
    Row("peft_use_rslora", "lora.use_rslora"),
    Row("peft_use_dora", "lora.use_dora"),
    Row("peft_init_lora_weights", "lora.init_lora_weights"),
    Row("lora_model_dir", "lora.adapter_path"),
    Row("gradient_checkpointing", "lora.use_gradient_checkpointing", convert=_checkpointing),
    Row("datasets.path", "dataset.path"),
    Row("datasets.name", "dataset.name"),
    Row("datasets.split", "dataset.split"),
    Row("datasets.data_files", "dataset.path", "a file instead of a hub id"),
    Row("datasets.revision", "dataset.revision"),
    *left("the file's name tells", "datasets.ds_type"),
    *refused("rows are changed by that code: write the data as a file, or name dataset.prompt",
             "datasets.type"),
    Row("test_datasets.path", "dataset.eval_path"),
    Row("test_datasets.split", "dataset.eval_split"),
    *left("see dataset.eval_path", "test_datasets.*", "datasets.*"),
    *refused("name held-out data in dataset.eval_path", "val_set_size"),
    Row("micro_batch_size", "grpo.per_device_train_batch_size"),
    Row("eval_batch_size", "grpo.per_device_eval_batch_size"),
    Row("num_epochs", "grpo.num_train_epochs"),
    Row("max_steps", "grpo.max_steps", convert=positive),
    Row("optimizer", "grpo.optim", convert=_optimizer),
    Row("lr_scheduler", "grpo.lr_scheduler_type"),
    Row("warmup_steps", "grpo.warmup_steps"),
    Row("warmup_ratio", "grpo.warmup_steps", "below 1 it is a part of the run"),
    Row("save_steps", "grpo.save_steps", convert=_steps),
    Row("eval_steps", "grpo.eval_steps", convert=_steps),
    *rows("grpo", "gradient_accumulation_steps", "learning_rate", "weight_decay", "max_grad_norm",
          "adam_beta1", "adam_beta2", "adam_epsilon", "lr_scheduler_kwargs", "optim_args",
          "optim_target_modules", "tf32", "seed", "save_strategy", "eval_strategy",
          "neftune_noise_alpha", "torch_compile", "report_to"),
    Row("saves_per_epoch", None, "write grpo.save_steps", refused=True),
    Row("evals_per_epoch", None, "write grpo.eval_steps and eval_strategy", refused=True),
    Row("save_total_limit", "runtime.keep_last"),
    Row("output_dir", "runtime.output_dir"),
    *left("model.dtype auto is bfloat16 where the card has it", "bf16", "fp16", "float16",
          "bfloat16"),
    *left("metrics are written every step", "logging_steps"),
    *left("a run is resumed by the same command", "resume_from_checkpoint",
          "auto_resume_from_checkpoints"),
    *left("attention is chosen by the model; write model.attn_implementation to change it",
          "flash_attention", "sdp_attention", "xformers_attention", "eager_attention"),
    *left(_TEXT, "chat_template", "tokenizer_type", "model_type", "tokenizer_config",
          "special_tokens", "special_tokens.*", "tokens", "is_llama_derived_model"),
    *left(_MEMORY, "deepspeed", "fsdp", "fsdp_config", "fsdp_version", "context_parallel_size",
          "sequence_parallel_degree", "tensor_parallel_size", "ddp", "dp_shard_size",
          "gradient_checkpointing_kwargs", "gradient_checkpointing_kwargs.*", "fsdp_config.*"),
    *left("packs are made by the training pass", "sample_packing", "pad_to_sequence_len",
          "eval_sample_packing", "flash_attn_fuse_qkv", "flash_attn_fuse_mlp"),
    *left("data is prepared by the run", "skip_prepare_dataset", "dataset_prepared_path",
          "dataset_processes", "dataset_num_proc", "shuffle_merged_datasets",
          "dataset_keep_in_memory"),
    *left("GRPO has no labels", "train_on_inputs", "group_by_length", "remove_unused_columns"),
    *left(_TRACKER, "wandb_project", "wandb_entity", "wandb_watch", "wandb_name", "wandb_log_model",
          "wandb_run_id", "mlflow_tracking_uri", "mlflow_experiment_name", "use_tensorboard",
          "comet_project_name", "use_wandb"),
    *left("a run publishes nothing by itself", "hub_model_id", "hub_strategy"),
    *left("no part of training", "strict", "debug", "local_rank", "early_stopping_patience",
          "save_safetensors", "low_cpu_mem_usage", "lora_mlp_kernel", "lora_qkv_kernel",
          "lora_o_kernel", "ddp_timeout", "save_only_model", "save_first_step",
          "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"),
    *refused("adapted weights are LoRA's: there is no ReLoRA, GaLore of the whole model or layer "
             "freezing here", "relora_steps", "unfrozen_parameters", "lisa_n_layers"),
    *left("layer kernels: grpo.use_liger_kernel", "plugins", "liger_rope", "liger_rms_norm",
          "liger_glu_activation", "liger_layer_norm", "liger_fused_linear_cross_entropy"),
    Row("vllm.gpu_memory_utilization", None, "that was the server's card; here it is sized"),
    Row("vllm.max_model_len", "model.max_seq_length"),
    *left("the engine runs in the training process; there is no server", "vllm.host", "vllm.port",
          "vllm.*"),
)  # fmt: skip
_TRL_OWN = (
    Row("trl.reward_funcs", "reward.functions", convert=later),
    Row("trl.vllm_gpu_memory_utilization", None, "that was the server's card; here it is sized"),
    Row("trl.vllm_max_model_len", "model.max_seq_length"),
    Row("trl.vllm_enable_prefix_caching", "model.enable_prefix_caching"),
    Row("trl.vllm_dtype", None, "the engine has the model's own type"),
    *left("the engine runs in the training process; there is no server", "trl.vllm_device",
          "trl.vllm_lora_sync", "trl.vllm_sync_interval", "trl.vllm_guided_decoding_regex"),
    *left(_ASYNC, "trl.use_data_producer", "trl.async_prefetch", "trl.prefetch_depth",
          "trl.streaming_partial_batch", "trl.streaming_min_groups"),
    *left("rows without an advantage are left out of the pass", "trl.skip_zero_advantage_batches"),
    *left("one process scores, beside the run", "trl.reward_num_workers"),
    *refused("there is no replay of older rollouts here", "trl.replay_buffer_size",
             "trl.replay_recompute_logps", off=(True,)),
    Row("trl.reroll_start_fraction", None, "no deferred second sampling here", refused=True,
        off=(None, 1.0, 1)),
    Row("trl.reroll_max_groups", None, "see reroll_start_fraction"),
    *refused("there is no such control of the entropy here; see grpo.use_adaptive_entropy",
             "trl.scope_rl"),
    *left("see scope_rl", "trl.scope_target_entropy", "trl.scope_alpha",
          "trl.scope_positive_threshold"),
    *refused("rollouts are the toolkit's own", "trl.rollout_func", "trl.reward_processing_classes"),
)  # fmt: skip
_NAMED = {row.old for row in _TRL_OWN}

TABLE = Table(
    form="axolotl",
    title="axolotl",
    rows=(*_TOP, *_TRL_OWN, *(row for row in trl_rows("trl.") if row.old not in _NAMED)),
    finish=_finish,
)
