"""The table of verl's keys and of the run file keys that replace them. The formats are hydra's YAML
files, and the overrides on the command line of ``verl.trainer.main_ppo`` (docs/examples/config.rst
of verl).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.config.importers.common import (
    NO_ADAPTER,
    convert_targets,
    function_in_file,
    is_positive_integer,
    new_name,
    positive_or_none,
    set_batch_size,
    set_sequence_length,
)
from toolkit.config.importers.mapping import (
    Default,
    Row,
    Table,
    UnsupportedValue,
    as_list,
    entries_in_order,
    later,
    omit,
    refused,
)

if TYPE_CHECKING:
    from toolkit.config.importers.mapping import Translation

_ACTOR = "actor_rollout_ref.actor"
_ROLLOUT = "actor_rollout_ref.rollout"
_MODEL = "actor_rollout_ref.model"
_SPREAD = (
    "every GPU has a complete copy of the model; several GPUs train data-parallel "
    "(--nproc-per-node)"
)
_AGAIN = (
    "reference log-probabilities are computed in the same pass, with the base model without the "
    "adapter"
)
_SIZED = "the toolkit chooses the size of the micro-batches"
_BATCH = (
    "data.train_batch_size",
    f"{_ACTOR}.ppo_mini_batch_size",
    f"{_ACTOR}.ppo_micro_batch_size_per_gpu",
)
_LOSSES = {
    "token-mean": "dapo",
    "seq-mean-token-mean": "grpo",
    "seq-mean-token-sum-norm": "dr_grpo",
}


def _one_file(value: object) -> Any:
    files = as_list(value)
    if len(files) != 1:
        raise UnsupportedValue(
            "a run reads only one file for training and one for evaluation: join the files"
        )
    return files[0]


def _loss_type(value: object) -> str:
    if not isinstance(value, str) or value not in _LOSSES:
        raise UnsupportedValue(
            f"only the values {', '.join(_LOSSES)} correspond to a grpo.loss_type"
        )
    return _LOSSES[value]


def _engine(value: object) -> Any:
    return new_name(value, {"vllm": "vllm", "hf": "transformers"}, None)


def _schedule(value: object) -> Any:
    return new_name(value, {"constant": "constant_with_warmup", "cosine": "cosine"})


def _interval(value: object) -> Any:
    return positive_or_none(value)


def _resamples(value: Any) -> int:
    """Return the value of ``grpo.max_resample_times`` for verl's limit. verl's limit includes the
    first batch, so the result is one less. Raises UnsupportedValue for a limit of 0 (in verl: no
    limit) and for a limit of 1 (verl never samples a batch again).
    """
    if not is_positive_integer(value):
        raise UnsupportedValue("a run file needs a limit, and the limit must be a positive number")
    if value == 1:
        raise UnsupportedValue(
            "with a limit of 1, verl never samples a batch again. Set grpo.dynamic_sampling: false"
        )
    return int(value) - 1


def _positive_number_or_none(value: object) -> Any:
    return value if isinstance(value, (int, float)) and value > 0 else None


def _set_batch_sizes(translation: Translation) -> None:
    """Convert the batch sizes. verl states numbers of prompts, and a run file states numbers of
    completions. Each mini-batch of verl becomes one optimizer step.
    """
    samples = translation.foreign_value(f"{_ROLLOUT}.n")
    prompts = translation.foreign_value("data.train_batch_size")
    mini = translation.foreign_value(f"{_ACTOR}.ppo_mini_batch_size")
    micro = translation.foreign_value(f"{_ACTOR}.ppo_micro_batch_size_per_gpu")
    if not (is_positive_integer(samples) and is_positive_integer(prompts)):
        for entry in entries_in_order(translation, _BATCH):
            translation.record_unread(
                entry,
                "batch sizes can be converted only if data.train_batch_size and rollout.n are set",
            )
        return
    total = samples * prompts
    why = f"data.train_batch_size {prompts} prompts x rollout.n {samples}"
    if not is_positive_integer(mini) or mini >= prompts:
        set_batch_size(translation, total, why)
        return
    step_completions = mini * samples
    micro_batch = micro if is_positive_integer(micro) and step_completions % micro == 0 else samples
    translation.write("grpo.generation_batch_size", total, why)
    translation.write(
        "grpo.per_device_train_batch_size", micro_batch, "completions in one pass on one GPU"
    )
    note = (
        f"ppo_mini_batch_size {mini} prompts x {samples} = {step_completions} completions per step"
        f" / {micro_batch}"
    )
    translation.write("grpo.gradient_accumulation_steps", step_completions // micro_batch, note)


def _set_kl_and_clipping(translation: Translation) -> None:
    if translation.foreign_value(f"{_ACTOR}.use_kl_loss") is True:
        coefficient = translation.foreign_value(f"{_ACTOR}.kl_loss_coef", 0.001)
        translation.write("grpo.beta", coefficient, f"{_ACTOR}.kl_loss_coef, with use_kl_loss")
    else:
        for entry in entries_in_order(
            translation, (f"{_ACTOR}.use_kl_loss", f"{_ACTOR}.kl_loss_coef")
        ):
            translation.leave_out(entry, "there is no KL term without use_kl_loss")
    low = translation.foreign_value(f"{_ACTOR}.clip_ratio_low")
    if low is not None:
        translation.write("grpo.epsilon", low, f"{_ACTOR}.clip_ratio_low")
    _set_dual_clipping(translation)


def _set_dual_clipping(translation: Translation) -> None:
    """Convert ``clip_ratio_c``, the limit of the probability ratio for negative advantages (dual
    clipping). verl uses it in every run, with the default 3.

    TRL's ``delta`` limits the ratio for positive advantages too. If ``delta`` is above
    ``1 + epsilon_high``, this has no effect, because the ratio is clipped there already.
    """
    key = f"{_ACTOR}.clip_ratio_c"
    given = translation.find_entries(key)
    limit = translation.foreign_value(key, 3.0)
    epsilon = translation.foreign_value(f"{_ACTOR}.clip_ratio", 0.2)  # verl's default
    epsilon_high = translation.foreign_value(f"{_ACTOR}.clip_ratio_high", epsilon)
    if _is_number(limit) and _is_number(epsilon_high) and limit > 1 + epsilon_high:
        why = key if given else "verl's default (clip_ratio_c)"
        translation.write("grpo.delta", float(limit), why)
        return
    for entry in given.values():
        translation.refuse(
            entry, "grpo.delta has the same effect only if it is a number above 1 + clip_ratio_high"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _add_rewards(translation: Translation) -> None:
    for key in ("custom_reward_function.path", "reward.custom_reward_function.path"):
        for entry in translation.find_entries(key).values():
            if entry.value is None:
                continue
            name = translation.foreign_value(key.replace(".path", ".name"), "compute_score")
            try:
                function = function_in_file(entry.value, name)
            except UnsupportedValue as reason:
                translation.refuse(entry, str(reason))
                continue
            translation.add_reward(function, f"{entry.location}: {key}")
            translation.notes.append(
                f"{function}: verl calls this function for one sample (data_source, "
                "solution_str, ground_truth, extra_info). In this toolkit, a reward function "
                "takes (prompts, completions, **columns) and returns a list of scores. Write a "
                "wrapper function."
            )
    if not translation.rewards:
        translation.notes.append(
            "verl chooses a scoring function by the column data_source. In a run file, set "
            "reward.functions to a scoring function, for example numeric_match."
        )


def _finish(translation: Translation) -> None:
    if not translation.foreign_value(f"{_MODEL}.lora_rank"):
        translation.notes.append(f"The file does not set {_MODEL}.lora_rank, but {NO_ADAPTER}.")
    _set_batch_sizes(translation)
    _set_kl_and_clipping(translation)
    _add_rewards(translation)
    values = translation.run_values
    if "grpo.warmup_steps" in values and "grpo.lr_scheduler_type" not in values:
        translation.write(
            "grpo.lr_scheduler_type",
            "constant_with_warmup",
            "verl's default (constant), which has a warm-up there",
        )
    if "grpo.eval_steps" in values:
        translation.write("grpo.eval_strategy", "steps", "because trainer.test_freq is set")
    set_sequence_length(translation)


ROWS = (
    Row(f"{_MODEL}.path", "model.model_name"),
    Row(f"{_MODEL}.trust_remote_code", "model.trust_remote_code"),
    Row("data.trust_remote_code", "model.trust_remote_code"),
    Row(f"{_MODEL}.lora_rank", "lora.r", convert=positive_or_none),
    Row(f"{_MODEL}.lora_alpha", "lora.lora_alpha"),
    Row(f"{_MODEL}.target_modules", "lora.target_modules", convert=convert_targets),
    Row(f"{_MODEL}.exclude_modules", "lora.exclude_modules"),
    Row(f"{_MODEL}.lora_adapter_path", "lora.adapter_path"),
    Row(f"{_MODEL}.enable_gradient_checkpointing", "lora.use_gradient_checkpointing"),
    Row(f"{_MODEL}.use_liger", "grpo.use_liger_kernel"),
    *omit("the trainer packs sequences itself (runtime.padding_free)",
          f"{_MODEL}.use_remove_padding",
          f"{_MODEL}.use_fused_kernels", f"{_MODEL}.fused_kernel_options.*"),
    *omit("lora.use_gradient_checkpointing: unsloth offloads activations",
          f"{_MODEL}.enable_activation_offload"),
    *omit("the toolkit chooses this setting itself when it loads the model", f"{_MODEL}.*"),
    *refused("your own code that changes the model is not supported",
             f"{_MODEL}.external_lib", f"{_MODEL}.override_config"),
    Row("data.train_files", "dataset.path", convert=_one_file),
    Row("data.val_files", "dataset.eval_path", convert=_one_file),
    Row("data.prompt_key", "dataset.prompt"),
    Row("data.max_prompt_length", "grpo.max_prompt_length"),
    Row("data.max_response_length", "grpo.max_completion_length"),
    Row("data.train_batch_size", "grpo.generation_batch_size", "number of prompts x rollout.n",
                                                               later),
    Row("data.shuffle", "grpo.shuffle_dataset"),
    Row("data.seed", "grpo.seed"),
    Row("data.train_max_samples", "dataset.limit", convert=positive_or_none),
    Row("data.val_max_samples", "dataset.eval_limit", convert=positive_or_none),
    Row("data.apply_chat_template_kwargs", "grpo.chat_template_kwargs"),
    *omit("a run always removes tokens at the start of a prompt that is too long, and counts "
          "such prompts",
          "data.filter_overlong_prompts", "data.truncation",
          "data.filter_overlong_prompts_workers"),
    *omit("every column is passed to the rewards",
          "data.return_raw_chat", "data.return_raw_input_ids",
          "data.return_full_prompt", "data.reward_fn_key"),
    *omit("the model determines this", "data.tokenizer", "data.image_key", "data.video_key"),
    *refused("write the data to a file with a prompt column", "data.custom_cls.path"),
    *omit("the run sets this itself", "data.*"),
    Row(f"{_ACTOR}.optim.lr", "grpo.learning_rate"),
    Row(f"{_ACTOR}.optim.weight_decay", "grpo.weight_decay"),
    Row(f"{_ACTOR}.optim.lr_warmup_steps", "grpo.warmup_steps", convert=_positive_number_or_none),
    Row(f"{_ACTOR}.optim.lr_warmup_steps_ratio", "grpo.warmup_steps",
        "a value below 1 is a fraction of the run", convert=_positive_number_or_none),
    Row(f"{_ACTOR}.optim.warmup_style", "grpo.lr_scheduler_type", convert=_schedule),
    Row(f"{_ACTOR}.optim.lr_scheduler_type", "grpo.lr_scheduler_type", convert=_schedule),
    *omit("the default of the schedule or the optimizer is used", f"{_ACTOR}.optim.*"),
    Row(f"{_ACTOR}.ppo_mini_batch_size", "grpo.gradient_accumulation_steps",
        "each mini-batch of verl becomes one optimizer step of the run", later),
    Row(f"{_ACTOR}.ppo_micro_batch_size_per_gpu", "grpo.per_device_train_batch_size", "", later),
    Row(f"{_ACTOR}.ppo_epochs", "grpo.num_iterations"),
    Row(f"{_ACTOR}.grad_clip", "grpo.max_grad_norm"),
    Row(f"{_ACTOR}.clip_ratio", "grpo.epsilon"),
    Row(f"{_ACTOR}.clip_ratio_low", "grpo.epsilon", "", later),
    Row(f"{_ACTOR}.clip_ratio_high", "grpo.epsilon_high"),
    Row(f"{_ACTOR}.clip_ratio_c", "grpo.delta", "", later),
    Row(f"{_ACTOR}.entropy_coeff", "grpo.entropy_coef"),
    Row(f"{_ACTOR}.use_kl_loss", "grpo.beta", "if it is true, grpo.beta is kl_loss_coef", later),
    Row(f"{_ACTOR}.kl_loss_coef", "grpo.beta", "", later),
    *refused("the KL term is always estimated by k3 (low_var_kl)", f"{_ACTOR}.kl_loss_type",
             off=("low_var_kl", "k3")),
    Row(f"{_ACTOR}.loss_agg_mode", "grpo.loss_type", convert=_loss_type),
    *omit("the corresponding keys are runtime.padding_free and grpo.torch_compile",
          f"{_ACTOR}.use_torch_compile",
          f"{_ACTOR}.use_dynamic_bsz", f"{_ACTOR}.ppo_max_token_len_per_gpu"),
    *omit(_SIZED, f"{_ACTOR}.ppo_micro_batch_size"),
    *omit(_SPREAD, f"{_ACTOR}.strategy", f"{_ACTOR}.fsdp_config.*",
          f"{_ACTOR}.ulysses_sequence_parallel_size", f"{_ACTOR}.megatron.*"),
    *omit("checkpoints always contain everything that a resumed run needs",
          f"{_ACTOR}.checkpoint.*"),
    *omit("the run sets this itself", f"{_ACTOR}.shuffle", f"{_ACTOR}.data_loader_seed"),
    *omit(_AGAIN, "actor_rollout_ref.ref.*"),
    *omit("one process always samples and trains", "actor_rollout_ref.hybrid_engine",
          "actor_rollout_ref.nccl_timeout"),
    Row(f"{_ROLLOUT}.n", "grpo.num_generations"),
    Row(f"{_ROLLOUT}.name", "runtime.engine", convert=_engine),
    Row(f"{_ROLLOUT}.temperature", "grpo.temperature"),
    Row(f"{_ROLLOUT}.top_p", "grpo.top_p"),
    Row(f"{_ROLLOUT}.top_k", "grpo.top_k"),
    Row(f"{_ROLLOUT}.repetition_penalty", "grpo.repetition_penalty"),
    Row(f"{_ROLLOUT}.max_model_len", "model.max_seq_length"),
    Row(f"{_ROLLOUT}.max_num_seqs", "model.max_num_seqs"),
    Row(f"{_ROLLOUT}.max_num_batched_tokens", "model.max_num_batched_tokens"),
    Row(f"{_ROLLOUT}.enforce_eager", "model.enforce_eager"),
    Row(f"{_ROLLOUT}.enable_chunked_prefill", "model.enable_chunked_prefill"),
    Row(f"{_ROLLOUT}.enable_prefix_caching", "model.enable_prefix_caching"),
    Row(f"{_ROLLOUT}.free_cache_engine", "model.enable_sleep_mode"),
    Row(f"{_ROLLOUT}.dtype", None, "the engine uses the dtype of the model (model.dtype)"),
    Row(f"{_ROLLOUT}.gpu_memory_utilization", None, "the engine shares the GPU with the "
                                                    "trainer; use `envcheck size` to compute "
                                                    "the value"),
    *omit(_SPREAD, f"{_ROLLOUT}.tensor_model_parallel_size", f"{_ROLLOUT}.data_parallel_size"),
    Row(f"{_ROLLOUT}.do_sample", None, "rollouts are always sampled",
                                       refused=True, off=(None, True)),
    Row(f"{_ROLLOUT}.multi_turn.enable", None, "a rollout can have several turns only with the "
                                               "section `tools` or an openenv environment",
        refused=True),
    *omit("evaluation uses the same sampling settings as training", f"{_ROLLOUT}.val_kwargs.*"),
    *omit("data.max_prompt_length and data.max_response_length set the lengths",
          f"{_ROLLOUT}.prompt_length",
          f"{_ROLLOUT}.response_length"),
    *omit("the engine uses the same weights as the trainer", f"{_ROLLOUT}.load_format",
          f"{_ROLLOUT}.layered_summon", f"{_ROLLOUT}.*"),
    *refused("this toolkit supports only GRPO", "algorithm.adv_estimator", off=("grpo",)),
    Row("algorithm.norm_adv_by_std_in_grpo", "grpo.scale_rewards"),
    *refused("the KL term is always added to the loss (grpo.beta), not to the reward",
             "algorithm.use_kl_in_reward"),
    Row("algorithm.filter_groups.enable", "grpo.dynamic_sampling"),
    Row("algorithm.filter_groups.max_num_gen_batches", "grpo.max_resample_times",
        "verl's number includes the first batch, but max_resample_times does not include it",
        _resamples),
    *omit("groups are always filtered by the spread of their weighted rewards",
          "algorithm.filter_groups.*"),
    *omit("this setting has no meaning in GRPO",
          "algorithm.*", "critic.*", "trainer.critic_warmup"),
    Row("custom_reward_function.path", "reward.functions", "reward.functions names the function "
                                                           "in the form module:function", later),
    Row("custom_reward_function.name", "reward.functions", "", later),
    Row("reward.custom_reward_function.path", "reward.functions", "reward.functions names the "
                                                                  "function in the form "
                                                                  "module:function", later),
    Row("reward.custom_reward_function.name", "reward.functions", "", later),
    *refused("to use a reward model, call the model from your own reward function",
             "reward_model.enable"),
    *omit("rewards always run in a separate process", "reward_model.*", "reward.*",
          "custom_reward_function.*"),
    Row("trainer.total_epochs", "grpo.num_train_epochs"),
    Row("trainer.total_training_steps", "grpo.max_steps", convert=positive_or_none),
    Row("trainer.save_freq", "grpo.save_steps", convert=_interval),
    Row("trainer.test_freq", "grpo.eval_steps", convert=_interval),
    Row("trainer.val_before_train", "grpo.eval_on_start"),
    Row("trainer.max_actor_ckpt_to_keep", "runtime.keep_last", convert=positive_or_none),
    Row("trainer.default_local_dir", "runtime.output_dir"),
    Row("trainer.experiment_name", "grpo.run_name"),
    Row("trainer.project_name", "grpo.project"),
    *omit("a run always writes metrics.jsonl and a report; to use a tracker, set grpo.report_to",
          "trainer.logger", "trainer.log_val_generations"),
    *omit("set the number of processes with `toolkit train --nproc-per-node`, or with torchrun",
          "trainer.n_gpus_per_node",
          "trainer.nnodes", "trainer.device"),
    *omit("to resume a run, start the same command again", "trainer.resume_mode",
          "trainer.resume_from_path"),
    *omit("a run does not use this setting",
          "trainer.*", "ray_init.*", "ray_kwargs.*", "global_profiler.*",
          "hydra.*", "defaults"),
)  # fmt: skip

TABLE = Table(
    format_name="verl",
    title="verl",
    rows=ROWS,
    defaults=(
        Default("grpo.loss_type", "dapo", "verl's default (token-mean)"),
        Default("grpo.lr_scheduler_type", "constant", "verl's default"),
        Default("grpo.weight_decay", 0.01, "verl's default"),
        Default("dataset.prompt", "prompt", "verl's default"),
    ),
    finish=_finish,
)
