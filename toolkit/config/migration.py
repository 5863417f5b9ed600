"""Tables of keys of TRL, Unsloth, PEFT and transformers: old keys with their replacements, and keys
that have no effect in this toolkit.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class MovedKey(NamedTuple):
    """The replacement of an old key. ``new_key`` is the dotted key that replaces the old key; None
    means that nothing replaces it. ``library`` is the name of the library that has or had the old
    key. ``details`` is additional text for messages.
    """

    new_key: str | None
    library: str
    details: str

    @property
    def sentence(self) -> str:
        """A text for messages that says which key replaces the old key."""
        if self.new_key is None:
            before = f"this key of {self.library} does not exist here"
            return f"{before}: {self.details}" if self.details else before
        return f"this is the name in {self.library}; here the key is {self.new_key}" + (
            f" ({self.details})" if self.details else ""
        )


MOVED_KEYS: dict[str, MovedKey] = {
    "grpo.warmup_ratio": MovedKey(
        "grpo.warmup_steps", "transformers 4", "a value below 1 is a fraction of the run"
    ),
    "grpo.evaluation_strategy": MovedKey("grpo.eval_strategy", "older transformers", ""),
    "grpo.per_gpu_train_batch_size": MovedKey(
        "grpo.per_device_train_batch_size", "older transformers", ""
    ),
    "grpo.per_gpu_eval_batch_size": MovedKey(
        "grpo.per_device_eval_batch_size", "older transformers", ""
    ),
    "grpo.no_cuda": MovedKey(
        None,
        "older transformers",
        "a GPU is used if there is one; to hide it, set CUDA_VISIBLE_DEVICES to an empty string",
    ),
    "grpo.group_by_length": MovedKey(
        None, "transformers 4", "GRPO uses its own sampler of prompt groups"
    ),
    "grpo.logging_dir": MovedKey(None, "transformers 4", "all logs are in the run folder"),
    "grpo.overwrite_output_dir": MovedKey(
        None, "transformers 4", "a run never overwrites another run: set a new runtime.output_dir"
    ),
    "grpo.save_safetensors": MovedKey(
        None, "transformers 4", "weights are always saved as safetensors"
    ),
    "grpo.max_new_tokens": MovedKey("grpo.max_completion_length", "older TRL", ""),
    "grpo.use_liger_loss": MovedKey("grpo.use_liger_kernel", "older TRL", ""),
    "grpo.vllm_guided_decoding_regex": MovedKey(
        "grpo.vllm_structured_outputs_regex", "older TRL", ""
    ),
    "grpo.vllm_importance_sampling_cap": MovedKey(
        "grpo.vllm_importance_sampling_clip_max", "TRL before 1.6", ""
    ),
    "grpo.use_transformers_paged": MovedKey(
        "grpo.use_transformers_continuous_batching", "TRL before 1.2", ""
    ),
    "grpo.wandb_log_unique_prompts": MovedKey("grpo.log_unique_prompts", "older TRL", ""),
    "grpo.kl_coef": MovedKey("grpo.beta", "older TRL", "the KL coefficient is called beta"),
    "grpo.max_seq_length": MovedKey("model.max_seq_length", "older TRL", ""),
    "grpo.max_length": MovedKey("model.max_seq_length", "older TRL", ""),
    "grpo.dataset_text_field": MovedKey(
        "dataset.prompt", "older TRL", "dataset.prompt names the prompt column"
    ),
    "grpo.peft_config": MovedKey("lora", "TRL's trainer", "the lora section describes the adapter"),
    "grpo.unsloth_num_chunks": MovedKey(
        None, "Unsloth", "the toolkit always computes log-probabilities in chunks"
    ),
    "grpo.unsloth_grpo_mini_batch": MovedKey(
        None,
        "Unsloth",
        "set per_device_train_batch_size to a number, or to auto (the toolkit then chooses the "
        "number)",
    ),
    "grpo.vllm_sampling_params": MovedKey(
        None, "Unsloth", "use temperature, top_p, top_k, min_p and generation_kwargs"
    ),
    "model.max_seq_len": MovedKey("model.max_seq_length", "Unsloth", ""),
    "model.torch_dtype": MovedKey("model.dtype", "transformers 4", ""),
    "model.rope_scaling": MovedKey(
        None, "other tools", "rope scaling is read from the checkpoint's config.json"
    ),
    "model.device_map": MovedKey(
        None, "other tools", "each process loads the model onto its own GPU"
    ),
    "lora.alpha": MovedKey("lora.lora_alpha", "PEFT", ""),
    "lora.dropout": MovedKey("lora.lora_dropout", "PEFT", ""),
    "lora.rank": MovedKey("lora.r", "PEFT", ""),
    "lora.lora_r": MovedKey("lora.r", "PEFT", ""),
    "lora.lora_rank": MovedKey("lora.r", "PEFT", ""),
    "lora.lora_target_modules": MovedKey("lora.target_modules", "PEFT", ""),
    "lora.seed": MovedKey("lora.random_state", "Unsloth", ""),
    "lora.task_type": MovedKey(None, "other tools", "the task type is always CAUSAL_LM"),
}


# Fields that the trainer always sets itself, so that the run file cannot change them, and the
# reason.
FORCED_KEYS = {
    "grpo.logging_strategy": "metrics are written every step",
    "grpo.logging_steps": "metrics are written every step",
    "grpo.disable_tqdm": "the run prints its own progress",
    "grpo.use_cpu": (
        "a GPU is used if there is one; to hide it, set CUDA_VISIBLE_DEVICES to an empty string"
    ),
    "grpo.include_num_input_tokens_seen": "num_tokens in metrics.jsonl counts the tokens",
    "grpo.include_for_metrics": "GRPO evaluates with rewards and has no compute_metrics",
    "grpo.remove_unused_columns": "rewards always get every column of the dataset",
    "grpo.ddp_backend": "processes communicate over NCCL if they have GPUs, else over gloo",
}
# Fields that have no effect in GRPO, and the reason.
INERT_KEYS = {
    "grpo.label_smoothing_factor": "the loss of GRPO has no labels to smooth",
    "grpo.label_names": "the loss of GRPO has no labels",
    "grpo.batch_eval_metrics": "GRPO evaluates with rewards and has no compute_metrics",
    "grpo.prediction_loss_only": "GRPO evaluates with rewards and has no compute_metrics",
    "grpo.eval_do_concat_batches": "GRPO evaluates with rewards and has no compute_metrics",
    "grpo.logging_first_step": "metrics are written every step",
    "grpo.num_completions_to_print": (
        "completions are not printed; completions.jsonl contains all of them"
    ),
    "grpo.train_sampling_strategy": (
        "GRPO uses its own sampler of prompt groups; shuffle_dataset sets the order"
    ),
    "grpo.length_column_name": "GRPO uses its own sampler of prompt groups",
    "grpo.data_seed": "grpo.seed determines the order of the prompts",
    "grpo.max_tool_calling_iterations": (
        "the run file has no section tools and no environment with several turns"
    ),
    "grpo.restore_callback_states_from_checkpoint": "a resumed run always restores all state",
    "grpo.average_tokens_across_devices": (
        "the loss of GRPO always averages over the tokens of all devices"
    ),
}


class Conversion(NamedTuple):
    """How --fix converts an old key without changing its meaning. --fix replaces the old key by the
    key ``new_key``, or removes it.

    ``values`` maps each old value to the new value. A value that is missing in ``values`` cannot be
    converted. If ``values`` is None, every value stays unchanged. ``removable_values`` lists the
    values with which the old key has no effect. A key with such a value is removed.
    """

    new_key: str | None = None
    values: dict[Any, Any] | None = None
    removable_values: tuple[Any, ...] = ()


CONVERSIONS: dict[str, Conversion] = {
    "grpo.use_vllm": Conversion("runtime.engine", {True: "vllm", False: "transformers"}),
    "grpo.vllm_mode": Conversion(removable_values=("colocate",)),
    "grpo.vllm_gpu_memory_utilization": Conversion("model.gpu_memory_utilization"),
    "grpo.vllm_max_model_length": Conversion("model.max_seq_length"),
    "grpo.vllm_tensor_parallel_size": Conversion(removable_values=(1,)),
    "grpo.vllm_enable_sleep_mode": Conversion("model.enable_sleep_mode"),
    "grpo.gradient_checkpointing": Conversion("lora.use_gradient_checkpointing"),
    "grpo.save_total_limit": Conversion("runtime.keep_last"),
    "grpo.push_to_hub": Conversion(removable_values=(False,)),
    "grpo.do_train": Conversion(removable_values=(True,)),
    "grpo.do_eval": Conversion(removable_values=(False,)),
    "grpo.do_predict": Conversion(removable_values=(False,)),
    "grpo.local_rank": Conversion(removable_values=(-1,)),
    "grpo.group_by_length": Conversion(removable_values=(True, False)),
    "grpo.no_cuda": Conversion(removable_values=(False,)),
    "grpo.overwrite_output_dir": Conversion(removable_values=(False,)),
    "grpo.save_safetensors": Conversion(removable_values=(True,)),
    "model.device_map": Conversion(removable_values=("auto",)),
    "lora.task_type": Conversion(removable_values=("CAUSAL_LM",)),
}
"""How --fix converts old keys. A key of ``MOVED_KEYS`` that is missing here is renamed and keeps
its value.
"""


def convert_key(old_key: str, value: Any) -> tuple[str | None, Any] | None:
    """Convert the old key ``old_key``, which has the value ``value`` in a run file. Return the new
    key and the new value. Return (None, None) if the old key can be removed. Return None if the
    user must decide.
    """
    conversion = CONVERSIONS.get(old_key)
    if conversion is None:
        new_key = MOVED_KEYS[old_key].new_key if old_key in MOVED_KEYS else None
        if old_key == "grpo.warmup_ratio" and not (_is_number(value) and value < 1):
            return None  # a warmup_steps of 1 would mean one step, not the whole run
        return (new_key, value) if new_key is not None and "." in new_key else None
    if any(
        type(removable) is type(value) and removable == value
        for removable in conversion.removable_values
    ):
        return None, None
    if conversion.new_key is None:
        return None
    if conversion.values is None:
        return conversion.new_key, value
    is_convertible = isinstance(value, (bool, str)) and value in conversion.values
    return (conversion.new_key, conversion.values[value]) if is_convertible else None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
