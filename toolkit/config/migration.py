"""What older TRL, Unsloth, PEFT and transformers called a key, and what became of it."""

from __future__ import annotations

from typing import NamedTuple


class Moved(NamedTuple):
    """``to`` is today's dotted key (None: gone); a rename in place when both are in one section."""

    to: str | None
    since: str
    told: str


MOVED: dict[str, Moved] = {
    "grpo.warmup_ratio": Moved(
        "grpo.warmup_steps", "transformers 5", "warmup_steps below 1 is a part of the run"
    ),
    "grpo.evaluation_strategy": Moved(
        "grpo.eval_strategy", "older transformers", "renamed to eval_strategy"
    ),
    "grpo.per_gpu_train_batch_size": Moved(
        "grpo.per_device_train_batch_size", "older transformers", "renamed"
    ),
    "grpo.no_cuda": Moved("grpo.use_cpu", "older transformers", "renamed to use_cpu"),
    "grpo.group_by_length": Moved(
        None, "transformers 5", "train_sampling_strategy: group_by_length does it"
    ),
    "grpo.logging_dir": Moved(None, "transformers 5", "the run folder holds all logs"),
    "grpo.overwrite_output_dir": Moved(None, "transformers 5", "runtime.resume: never does it"),
    "grpo.save_safetensors": Moved(None, "transformers 5", "safetensors is the only format"),
    "grpo.max_new_tokens": Moved(
        "grpo.max_completion_length", "older TRL", "called max_completion_length"
    ),
    "grpo.use_liger_loss": Moved("grpo.use_liger_kernel", "older TRL", "renamed"),
    "grpo.vllm_guided_decoding_regex": Moved(
        "grpo.vllm_structured_outputs_regex", "older TRL", "renamed"
    ),
    "grpo.vllm_importance_sampling_cap": Moved(
        "grpo.vllm_importance_sampling_clip_max", "TRL 1.6", "renamed"
    ),
    "grpo.use_transformers_paged": Moved(
        "grpo.use_transformers_continuous_batching", "TRL 1.2", "renamed"
    ),
    "grpo.wandb_log_unique_prompts": Moved("grpo.log_unique_prompts", "older TRL", "renamed"),
    "grpo.kl_coef": Moved("grpo.beta", "older TRL", "the KL coefficient is called beta"),
    "grpo.max_seq_length": Moved("model.max_seq_length", "older TRL", "it belongs to the model"),
    "grpo.max_length": Moved("model.max_seq_length", "older TRL", "it belongs to the model"),
    "grpo.dataset_text_field": Moved("dataset.prompt", "older TRL", "GRPO reads a prompt column"),
    "grpo.peft_config": Moved("lora", "TRL's trainer", "the adapter is described in lora"),
    "grpo.unsloth_num_chunks": Moved(
        None, "Unsloth", "log-probabilities are always computed in chunks here"
    ),
    "grpo.unsloth_grpo_mini_batch": Moved(
        None, "Unsloth", "the micro-batch is sized, or per_device_train_batch_size"
    ),
    "grpo.vllm_sampling_params": Moved(
        None, "Unsloth", "temperature, top_p, top_k, min_p and generation_kwargs do it"
    ),
    "model.max_seq_len": Moved("model.max_seq_length", "Unsloth", "called max_seq_length"),
    "model.torch_dtype": Moved("model.dtype", "transformers 5", "renamed to dtype"),
    "model.rope_scaling": Moved(None, "elsewhere", "it is read from the checkpoint's config.json"),
    "model.device_map": Moved(None, "elsewhere", "one process holds one copy on its own GPU"),
    "lora.alpha": Moved("lora.lora_alpha", "PEFT", "called lora_alpha"),
    "lora.dropout": Moved("lora.lora_dropout", "PEFT", "called lora_dropout"),
    "lora.rank": Moved("lora.r", "PEFT", "called r"),
    "lora.lora_r": Moved("lora.r", "PEFT", "called r"),
    "lora.lora_rank": Moved("lora.r", "PEFT", "called r"),
    "lora.lora_target_modules": Moved("lora.target_modules", "PEFT", "called target_modules"),
    "lora.seed": Moved("lora.random_state", "Unsloth", "called random_state"),
    "lora.task_type": Moved(None, "elsewhere", "it is always CAUSAL_LM"),
}
