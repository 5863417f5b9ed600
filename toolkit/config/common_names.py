"""Names that other tools, or their users, give to keys of a run file. For example, ``lr`` is the
key ``learning_rate``. Most of these names are spelled so differently from the key that a comparison
of spellings cannot find the key.
"""

from __future__ import annotations

_BY_KEY: dict[str, str] = {
    "model.model_name": "name path model model_id id base_model model_path model_name_or_path"
    " pretrained_model_name_or_path",
    "model.max_seq_length": "max_model_len context_length seq_len sequence_length",
    "lora.target_modules": "targets modules",
    "lora.adapter_path": "adapter adapter_name adapter_name_or_path",
    "dataset.path": "file files data_files train train_path train_file train_files hub_id id"
    " dataset_name repo_id",
    "dataset.eval_path": "eval eval_file eval_files val_path val_file val_files test_path test_file"
    " validation_file",
    "dataset.split": "train_split",
    "dataset.eval_split": "test_split val_split validation_split",
    "dataset.name": "config config_name subset dataset_config_name",
    "dataset.prompt": "prompt_column prompt_key prompt_field question question_column",
    "dataset.answer": "answer_column answer_key answer_field solution label response_column",
    "dataset.system": "system_prompt system_message",
    "dataset.limit": "max_samples num_samples max_train_samples",
    "dataset.eval_limit": "max_eval_samples",
    "reward.functions": "function funcs reward_funcs reward_functions rewards",
    "grpo.learning_rate": "lr",
    "grpo.lr_scheduler_type": "scheduler lr_scheduler scheduler_type lr_schedule",
    "grpo.warmup_steps": "warmup num_warmup_steps",
    "grpo.num_train_epochs": "epochs num_epochs n_epochs total_epochs",
    "grpo.max_steps": "steps num_steps total_steps train_steps num_train_steps"
    " total_training_steps",
    "grpo.per_device_train_batch_size": "batch_size micro_batch_size train_batch_size"
    " micro_batch_size_per_gpu",
    "grpo.gradient_accumulation_steps": "grad_accum grad_accum_steps gradient_accumulation"
    " accumulation_steps accumulate_grad_batches",
    "grpo.max_grad_norm": "grad_clip clip_grad clip_grad_norm gradient_clipping",
    "grpo.optim": "optimizer",
    "grpo.num_generations": "n group_size num_samples num_rollouts n_samples samples_per_prompt"
    " num_samples_per_prompt n_samples_per_prompt rollouts_per_prompt",
    "grpo.max_completion_length": "max_tokens max_response_length max_generate_length"
    " generate_max_len max_output_length response_length",
    "grpo.epsilon": "clip_range cliprange clip_eps eps_clip clip_ratio clip_ratio_low",
    "grpo.epsilon_high": "clip_high eps_clip_high clip_ratio_high clip_eps_high",
    "grpo.beta": "kl_coeff kl_beta kl_loss_coef kl_penalty init_kl_coef",
    "grpo.entropy_coef": "entropy_bonus entropy_coeff entropy_loss_coef",
    "grpo.loss_type": "loss",
    "runtime.output_dir": "out output out_dir run_dir",
}

COMMON_NAMES = {
    f"{key.partition('.')[0]}.{name}": key
    for key, names in _BY_KEY.items()
    for name in names.split()
}
"""The key that is meant, by the name that others give it in the same section. Both are dotted."""

OTHER_UNIT = {"grpo.batch_size", "grpo.train_batch_size", "grpo.micro_batch_size"}
"""Names whose values other tools count differently (prompts or completions, per device or in all).
So ``--fix`` does not rename them.
"""
