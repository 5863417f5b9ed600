"""The table of axolotl's keys and of the run file keys that replace them. Axolotl's format is a
YAML file with ``base_model`` and ``rl: grpo`` (docs/grpo.qmd and utils/schemas of axolotl).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.config.importers.common import (
    NO_ADAPTER,
    convert_dtype,
    convert_targets,
    new_name,
    positive_or_none,
    set_sequence_length,
    set_warmup_steps,
)
from toolkit.config.importers.mapping import (
    Row,
    Table,
    UnsupportedValue,
    later,
    omit,
    refused,
    rows,
    trl_rows,
)
from toolkit.config.importers.trl import add_trl_rewards

if TYPE_CHECKING:
    from toolkit.config.importers.mapping import Translation

_ASYNC = "rollouts and training alternate here, and rollouts always use the newest adapter"
_TEXT = "the settings in the tokenizer's files are used"
_MEMORY = (
    "every GPU has a complete copy of the model; several GPUs train data-parallel "
    "(--nproc-per-node)"
)
_TRACKER = "a run always writes metrics.jsonl and a report; to use a tracker, set grpo.report_to"


def _steps(value: object) -> Any:
    """Return axolotl's number of steps. Raises UnsupportedValue for a value below 1, because such a
    value is a fraction of an epoch in axolotl.
    """
    if isinstance(value, float) and 0 < value < 1:
        raise UnsupportedValue(
            "a value below 1 is a fraction of an epoch in axolotl, but a fraction of the run in "
            "a run file. Set a number of steps"
        )
    return value


def _optimizer(value: object) -> Any:
    return new_name(value, {"adamw_hf": "adamw_torch", "adamw_bnb_8bit": "adamw_8bit"})


def _checkpointing(value: object) -> Any:
    if isinstance(value, bool):
        return value
    return new_name(value, {"unsloth": "unsloth", "offload": "unsloth"}, True)


def _linear(value: object) -> Any:
    return "all-linear" if value is True else None


def _eval_strategy(translation: Translation) -> None:
    if (
        "grpo.eval_steps" in translation.run_values
        and "grpo.eval_strategy" not in translation.run_values
    ):
        translation.write("grpo.eval_strategy", "steps", "because eval_steps is set")


def _finish(translation: Translation) -> None:
    add_trl_rewards(translation, "trl.reward_funcs")
    if "adapter" not in {entry.key for entry in translation.foreign.entries}:
        translation.notes.append(f"The file does not set an adapter, but {NO_ADAPTER}.")
    if (
        translation.foreign_value("adapter") == "qlora"
        and "model.load_in_4bit" not in translation.run_values
    ):
        translation.write("model.load_in_4bit", True, "adapter: qlora")
    if translation.foreign_value("rl") is None:
        translation.notes.append(
            "The file does not set `rl: grpo`. Check that it is a config for GRPO training."
        )
    _eval_strategy(translation)
    set_warmup_steps(translation)
    set_sequence_length(translation)


_TOP = (
    Row("base_model", "model.model_name"),
    Row("model_name_or_path", "model.model_name"),
    Row("revision_of_model", "model.revision"),
    Row("trust_remote_code", "model.trust_remote_code"),
    Row("sequence_len", "model.max_seq_length"),
    Row("load_in_4bit", "model.load_in_4bit"),
    Row("load_in_8bit", "model.load_in_8bit"),
    Row("torch_dtype", "model.dtype", convert=convert_dtype),
    Row("attn_implementation", "model.attn_implementation"),
    *refused("this toolkit supports only GRPO", "rl", off=("grpo",)),
    *refused(NO_ADAPTER, "adapter", off=("lora", "qlora")),
    Row("lora_r", "lora.r"),
    Row("lora_alpha", "lora.lora_alpha"),
    Row("lora_dropout", "lora.lora_dropout"),
    Row("lora_target_modules", "lora.target_modules", convert=convert_targets),
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
    Row("datasets.data_files", "dataset.path", "dataset.path can name a file instead of a hub id"),
    Row("datasets.revision", "dataset.revision"),
    *omit("the name of the file determines its type", "datasets.ds_type"),
    *refused("this code changes the rows of the dataset. Write the changed rows to a file, or "
             "set dataset.prompt to the prompt column of the unchanged rows",
             "datasets.type"),
    Row("test_datasets.path", "dataset.eval_path"),
    Row("test_datasets.split", "dataset.eval_split"),
    *omit("a run reads only the data at dataset.path and dataset.eval_path",
          "test_datasets.*", "datasets.*"),
    *refused("set dataset.eval_path to the evaluation data", "val_set_size"),
    Row("micro_batch_size", "grpo.per_device_train_batch_size"),
    Row("eval_batch_size", "grpo.per_device_eval_batch_size"),
    Row("num_epochs", "grpo.num_train_epochs"),
    Row("max_steps", "grpo.max_steps", convert=positive_or_none),
    Row("optimizer", "grpo.optim", convert=_optimizer),
    Row("lr_scheduler", "grpo.lr_scheduler_type"),
    Row("warmup_steps", "grpo.warmup_steps"),
    Row("warmup_ratio", "grpo.warmup_steps", "a value below 1 is a fraction of the run"),
    Row("save_steps", "grpo.save_steps", convert=_steps),
    Row("eval_steps", "grpo.eval_steps", convert=_steps),
    *rows("grpo", "gradient_accumulation_steps", "learning_rate", "weight_decay", "max_grad_norm",
          "adam_beta1", "adam_beta2", "adam_epsilon", "lr_scheduler_kwargs", "optim_args",
          "optim_target_modules", "tf32", "seed", "save_strategy", "eval_strategy",
          "neftune_noise_alpha", "torch_compile", "report_to"),
    Row("saves_per_epoch", None, "set grpo.save_steps", refused=True),
    Row("evals_per_epoch", None, "set grpo.eval_steps and grpo.eval_strategy", refused=True),
    Row("save_total_limit", "runtime.keep_last"),
    Row("output_dir", "runtime.output_dir"),
    *omit("`model.dtype: auto` uses bfloat16 if the GPU supports it", "bf16", "fp16", "float16",
          "bfloat16"),
    *omit("metrics are written every step", "logging_steps"),
    *omit("to resume a run, start the same command again", "resume_from_checkpoint",
          "auto_resume_from_checkpoints"),
    *omit("transformers chooses the attention function; to change it, set "
          "model.attn_implementation",
          "flash_attention", "sdp_attention", "xformers_attention", "eager_attention"),
    *omit(_TEXT, "chat_template", "tokenizer_type", "model_type", "tokenizer_config",
          "special_tokens", "special_tokens.*", "tokens", "is_llama_derived_model"),
    *omit(_MEMORY, "deepspeed", "fsdp", "fsdp_config", "fsdp_version", "context_parallel_size",
          "sequence_parallel_degree", "tensor_parallel_size", "ddp", "dp_shard_size",
          "gradient_checkpointing_kwargs", "gradient_checkpointing_kwargs.*", "fsdp_config.*"),
    *omit("the trainer packs sequences itself (runtime.padding_free)",
          "sample_packing", "pad_to_sequence_len",
          "eval_sample_packing", "flash_attn_fuse_qkv", "flash_attn_fuse_mlp"),
    *omit("the run prepares the data itself", "skip_prepare_dataset", "dataset_prepared_path",
          "dataset_processes", "dataset_num_proc", "shuffle_merged_datasets",
          "dataset_keep_in_memory"),
    *omit("this setting concerns labels, and GRPO does not use labels",
          "train_on_inputs", "group_by_length", "remove_unused_columns"),
    *omit(_TRACKER, "wandb_project", "wandb_entity", "wandb_watch", "wandb_name", "wandb_log_model",
          "wandb_run_id", "mlflow_tracking_uri", "mlflow_experiment_name", "use_tensorboard",
          "comet_project_name", "use_wandb"),
    *omit("a run does not publish anything", "hub_model_id", "hub_strategy"),
    *omit("a run does not use this setting",
          "strict", "debug", "local_rank", "early_stopping_patience",
          "save_safetensors", "low_cpu_mem_usage", "lora_mlp_kernel", "lora_qkv_kernel",
          "lora_o_kernel", "ddp_timeout", "save_only_model", "save_first_step",
          "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"),
    *refused("a run trains a LoRA adapter, or all weights (model.full_finetuning). ReLoRA, LISA "
             "and layer freezing are not supported",
             "relora_steps", "unfrozen_parameters", "lisa_n_layers"),
    *omit("to use fused layer kernels, set grpo.use_liger_kernel",
          "plugins", "liger_rope", "liger_rms_norm",
          "liger_glu_activation", "liger_layer_norm", "liger_fused_linear_cross_entropy"),
    Row("vllm.gpu_memory_utilization", None, "the value is for a vLLM server on its own GPU; "
                                             "use `envcheck size` to compute a value for this "
                                             "toolkit"),
    Row("vllm.max_model_len", "model.max_seq_length"),
    *omit("the engine runs in the training process, so there is no vLLM server",
          "vllm.host", "vllm.port",
          "vllm.*"),
)  # fmt: skip
_TRL_OWN = (
    Row("trl.reward_funcs", "reward.functions", convert=later),
    Row("trl.vllm_gpu_memory_utilization", None, "the value is for a vLLM server on its own "
                                                 "GPU; use `envcheck size` to compute a value "
                                                 "for this toolkit"),
    Row("trl.vllm_max_model_len", "model.max_seq_length"),
    Row("trl.vllm_enable_prefix_caching", "model.enable_prefix_caching"),
    Row("trl.vllm_dtype", None, "the engine uses the dtype of the model (model.dtype)"),
    *omit("the engine runs in the training process, so there is no vLLM server", "trl.vllm_device",
          "trl.vllm_lora_sync", "trl.vllm_sync_interval", "trl.vllm_guided_decoding_regex"),
    *omit(_ASYNC, "trl.use_data_producer", "trl.async_prefetch", "trl.prefetch_depth",
          "trl.streaming_partial_batch", "trl.streaming_min_groups"),
    *omit("rows whose advantage is 0 are always left out of the training pass",
          "trl.skip_zero_advantage_batches"),
    *omit("one separate process computes the rewards", "trl.reward_num_workers"),
    *refused("a replay buffer of older rollouts is not supported", "trl.replay_buffer_size",
             "trl.replay_recompute_logps", off=(True,)),
    Row("trl.reroll_start_fraction", None, "sampling a prompt again in a later step is not "
                                           "supported", refused=True,
        off=(None, 1.0, 1)),
    Row("trl.reroll_max_groups", None, "this setting belongs to trl.reroll_start_fraction"),
    *refused("this control of the entropy is not supported; a similar setting is "
             "grpo.use_adaptive_entropy",
             "trl.scope_rl"),
    *omit("this setting belongs to trl.scope_rl", "trl.scope_target_entropy", "trl.scope_alpha",
          "trl.scope_positive_threshold"),
    *refused("a run always uses the toolkit's own rollouts",
             "trl.rollout_func", "trl.reward_processing_classes"),
)  # fmt: skip
_NAMED = {row.foreign_key for row in _TRL_OWN}

TABLE = Table(
    format_name="axolotl",
    title="axolotl",
    rows=(*_TOP, *_TRL_OWN, *(row for row in trl_rows("trl.") if row.foreign_key not in _NAMED)),
    finish=_finish,
)
