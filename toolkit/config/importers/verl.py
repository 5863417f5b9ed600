"""The format of verl: hydra's YAML or overrides of ``verl.trainer.main_ppo``
(docs/examples/config.rst).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.config.importers.common import (
    NO_ADAPTER,
    fit_length,
    from_file,
    is_count,
    positive,
    renamed,
    targets,
    whole_batch,
)
from toolkit.config.importers.mapping import (
    Default,
    Row,
    Table,
    Unfit,
    entries_of,
    later,
    left,
    refused,
    text_list,
)

if TYPE_CHECKING:
    from toolkit.config.importers.mapping import Translation

_ACTOR = "actor_rollout_ref.actor"
_ROLLOUT = "actor_rollout_ref.rollout"
_MODEL = "actor_rollout_ref.model"
_SPREAD = "every GPU has the whole model; several GPUs work data-parallel (--nproc-per-node)"
_AGAIN = "a reference for log-probabilities is the base below the adapter, in the same pass"
_SIZED = "micro-batches are cut by the sizer"
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


def _one_file(value: Any) -> Any:
    files = text_list(value)
    if len(files) != 1:
        raise Unfit("a run reads one file of each kind: join them")
    return files[0]


def _loss(value: Any) -> str:
    if not isinstance(value, str) or value not in _LOSSES:
        raise Unfit(f"of {', '.join(_LOSSES)} each has a loss_type here")
    return _LOSSES[value]


def _engine(value: Any) -> Any:
    return renamed(value, {"vllm": "vllm", "hf": "transformers"}, None)


def _schedule(value: Any) -> Any:
    return renamed(value, {"constant": "constant_with_warmup", "cosine": "cosine"})


def _interval(value: Any) -> Any:
    return positive(value)


def _resamples(value: Any) -> int:
    """How often a batch is sampled again. verl also counts the first batch, and 0 means no
    limit.
    """
    if not is_count(value):
        raise Unfit("the limit must be a positive number here")
    if value == 1:
        raise Unfit("with 1 batch verl samples nothing again: set grpo.dynamic_sampling: false")
    return int(value) - 1


def _share(value: Any) -> Any:
    return value if isinstance(value, (int, float)) and value > 0 else None


def _batches(made: Translation) -> None:
    """Convert the batch sizes: verl counts prompts and samples, a run file counts completions. A
    mini-batch of verl is an optimizer step.
    """
    samples = made.value_of(f"{_ROLLOUT}.n")
    prompts = made.value_of("data.train_batch_size")
    mini = made.value_of(f"{_ACTOR}.ppo_mini_batch_size")
    micro = made.value_of(f"{_ACTOR}.ppo_micro_batch_size_per_gpu")
    if not (is_count(samples) and is_count(prompts)):
        for entry in entries_of(made, _BATCH):
            made.miss(entry, "a batch needs data.train_batch_size and rollout.n")
        return
    total = samples * prompts
    why = f"data.train_batch_size {prompts} prompts x rollout.n {samples}"
    if not is_count(mini) or mini >= prompts:
        whole_batch(made, total, why)
        return
    step = mini * samples
    cut = micro if is_count(micro) and step % micro == 0 else samples
    made.write("grpo.generation_batch_size", total, why)
    made.write("grpo.per_device_train_batch_size", cut, "completions of a pass, on one GPU")
    note = f"ppo_mini_batch_size {mini} prompts x {samples} = {step} completions per step / {cut}"
    made.write("grpo.gradient_accumulation_steps", step // cut, note)


def _penalty(made: Translation) -> None:
    if made.value_of(f"{_ACTOR}.use_kl_loss") is True:
        coefficient = made.value_of(f"{_ACTOR}.kl_loss_coef", 0.001)
        made.write("grpo.beta", coefficient, f"{_ACTOR}.kl_loss_coef, with use_kl_loss")
    else:
        for entry in entries_of(made, (f"{_ACTOR}.use_kl_loss", f"{_ACTOR}.kl_loss_coef")):
            made.leave(entry, "there is no KL term without use_kl_loss")
    low = made.value_of(f"{_ACTOR}.clip_ratio_low")
    if low is not None:
        made.write("grpo.epsilon", low, f"{_ACTOR}.clip_ratio_low")


def _rewards(made: Translation) -> None:
    for key in ("custom_reward_function.path", "reward.custom_reward_function.path"):
        for entry in made.take(key).values():
            if entry.value is None:
                continue
            name = made.value_of(key.replace(".path", ".name"), "compute_score")
            try:
                function = from_file(entry.value, name)
            except Unfit as reason:
                made.refuse(entry, str(reason))
                continue
            made.reward(function, f"{entry.place}: {key}")
            made.notes.append(
                f"{function}: verl calls it for one sample (data_source, solution_str, "
                "ground_truth, extra_info); here a reward takes (prompts, completions, **columns) "
                "and returns a list: wrap it"
            )
    if not made.rewards:
        made.notes.append(
            "verl chooses a scorer by the column data_source; here reward.functions names one, "
            "for instance numeric_match"
        )


def _finish(made: Translation) -> None:
    if not made.value_of(f"{_MODEL}.lora_rank"):
        made.notes.append(f"There is no {_MODEL}.lora_rank in the file: {NO_ADAPTER}")
    _batches(made)
    _penalty(made)
    _rewards(made)
    if "grpo.eval_steps" in made.written:
        made.write("grpo.eval_strategy", "steps", "trainer.test_freq asks for it")
    fit_length(made)


ROWS = (
    Row(f"{_MODEL}.path", "model.model_name"),
    Row(f"{_MODEL}.trust_remote_code", "model.trust_remote_code"),
    Row("data.trust_remote_code", "model.trust_remote_code"),
    Row(f"{_MODEL}.lora_rank", "lora.r", convert=positive),
    Row(f"{_MODEL}.lora_alpha", "lora.lora_alpha"),
    Row(f"{_MODEL}.target_modules", "lora.target_modules", convert=targets),
    Row(f"{_MODEL}.exclude_modules", "lora.exclude_modules"),
    Row(f"{_MODEL}.lora_adapter_path", "lora.adapter_path"),
    Row(f"{_MODEL}.enable_gradient_checkpointing", "lora.use_gradient_checkpointing"),
    Row(f"{_MODEL}.use_liger", "grpo.use_liger_kernel"),
    *left("packs are made by the training pass", f"{_MODEL}.use_remove_padding",
          f"{_MODEL}.use_fused_kernels", f"{_MODEL}.fused_kernel_options.*"),
    *left("see lora.use_gradient_checkpointing: unsloth", f"{_MODEL}.enable_activation_offload"),
    *left("the loader knows the model", f"{_MODEL}.*"),
    *refused("code that changes the model", f"{_MODEL}.external_lib", f"{_MODEL}.override_config"),
    Row("data.train_files", "dataset.path", convert=_one_file),
    Row("data.val_files", "dataset.eval_path", convert=_one_file),
    Row("data.prompt_key", "dataset.prompt"),
    Row("data.max_prompt_length", "grpo.max_prompt_length"),
    Row("data.max_response_length", "grpo.max_completion_length"),
    Row("data.train_batch_size", "grpo.generation_batch_size", "prompts x rollout.n", later),
    Row("data.shuffle", "grpo.shuffle_dataset"),
    Row("data.seed", "grpo.seed"),
    Row("data.train_max_samples", "dataset.limit", convert=positive),
    Row("data.val_max_samples", "dataset.eval_limit", convert=positive),
    Row("data.apply_chat_template_kwargs", "grpo.chat_template_kwargs"),
    *left("prompts that are too long are cut from the left, and counted",
          "data.filter_overlong_prompts", "data.truncation",
          "data.filter_overlong_prompts_workers"),
    *left("every column reaches the rewards", "data.return_raw_chat", "data.return_raw_input_ids",
          "data.return_full_prompt", "data.reward_fn_key"),
    *left("it is the model's", "data.tokenizer", "data.image_key", "data.video_key"),
    *refused("write the data as a file with a prompt column", "data.custom_cls.path"),
    *left("it comes with the run", "data.*"),
    Row(f"{_ACTOR}.optim.lr", "grpo.learning_rate"),
    Row(f"{_ACTOR}.optim.weight_decay", "grpo.weight_decay"),
    Row(f"{_ACTOR}.optim.lr_warmup_steps", "grpo.warmup_steps", convert=_share),
    Row(f"{_ACTOR}.optim.lr_warmup_steps_ratio", "grpo.warmup_steps",
        "below 1 it is a part of the run", convert=_share),
    Row(f"{_ACTOR}.optim.warmup_style", "grpo.lr_scheduler_type", convert=_schedule),
    Row(f"{_ACTOR}.optim.lr_scheduler_type", "grpo.lr_scheduler_type", convert=_schedule),
    *left("the scheduler's own", f"{_ACTOR}.optim.*"),
    Row(f"{_ACTOR}.ppo_mini_batch_size", "grpo.gradient_accumulation_steps",
        "an optimizer step", later),
    Row(f"{_ACTOR}.ppo_micro_batch_size_per_gpu", "grpo.per_device_train_batch_size", "", later),
    Row(f"{_ACTOR}.ppo_epochs", "grpo.num_iterations"),
    Row(f"{_ACTOR}.grad_clip", "grpo.max_grad_norm"),
    Row(f"{_ACTOR}.clip_ratio", "grpo.epsilon"),
    Row(f"{_ACTOR}.clip_ratio_low", "grpo.epsilon", "", later),
    Row(f"{_ACTOR}.clip_ratio_high", "grpo.epsilon_high"),
    Row(f"{_ACTOR}.clip_ratio_c", None, "delta would bound both signs; the dual clip is not done",
        refused=True, off=(None, 3.0, 3)),
    Row(f"{_ACTOR}.entropy_coeff", "grpo.entropy_coef"),
    Row(f"{_ACTOR}.use_kl_loss", "grpo.beta", "kl_loss_coef where it is true", later),
    Row(f"{_ACTOR}.kl_loss_coef", "grpo.beta", "", later),
    *refused("the KL estimate is k3 (low_var_kl)", f"{_ACTOR}.kl_loss_type",
             off=("low_var_kl", "k3")),
    Row(f"{_ACTOR}.loss_agg_mode", "grpo.loss_type", convert=_loss),
    *left("runtime.padding_free, and grpo.torch_compile", f"{_ACTOR}.use_torch_compile",
          f"{_ACTOR}.use_dynamic_bsz", f"{_ACTOR}.ppo_max_token_len_per_gpu"),
    *left(_SIZED, f"{_ACTOR}.ppo_micro_batch_size"),
    *left(_SPREAD, f"{_ACTOR}.strategy", f"{_ACTOR}.fsdp_config.*",
          f"{_ACTOR}.ulysses_sequence_parallel_size", f"{_ACTOR}.megatron.*"),
    *left("checkpoints hold all that a resumed run needs", f"{_ACTOR}.checkpoint.*"),
    *left("it comes with the run", f"{_ACTOR}.shuffle", f"{_ACTOR}.data_loader_seed"),
    *left(_AGAIN, "actor_rollout_ref.ref.*"),
    *left("one process samples and trains", "actor_rollout_ref.hybrid_engine",
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
    Row(f"{_ROLLOUT}.dtype", None, "the engine has the model's own type"),
    Row(f"{_ROLLOUT}.gpu_memory_utilization", None, "it is sized for what trains beside it here"),
    *left(_SPREAD, f"{_ROLLOUT}.tensor_model_parallel_size", f"{_ROLLOUT}.data_parallel_size"),
    Row(f"{_ROLLOUT}.do_sample", None, "rollouts are sampled", refused=True, off=(None, True)),
    Row(f"{_ROLLOUT}.multi_turn.enable", None, "turns come from the section tools",
        refused=True),
    *left("evaluation samples as training does", f"{_ROLLOUT}.val_kwargs.*"),
    *left("see the lengths of prompt and response", f"{_ROLLOUT}.prompt_length",
          f"{_ROLLOUT}.response_length"),
    *left("the engine holds the very weights that train", f"{_ROLLOUT}.load_format",
          f"{_ROLLOUT}.layered_summon", f"{_ROLLOUT}.*"),
    *refused("this toolkit trains GRPO", "algorithm.adv_estimator", off=("grpo",)),
    Row("algorithm.norm_adv_by_std_in_grpo", "grpo.scale_rewards"),
    *refused("the KL term is in the loss (grpo.beta)", "algorithm.use_kl_in_reward"),
    Row("algorithm.filter_groups.enable", "grpo.dynamic_sampling"),
    Row("algorithm.filter_groups.max_num_gen_batches", "grpo.max_resample_times",
        "the first batch is not counted here", _resamples),
    *left("the spread of the weighted rewards decides", "algorithm.filter_groups.*"),
    *left("it has no part in GRPO", "algorithm.*", "critic.*", "trainer.critic_warmup"),
    Row("custom_reward_function.path", "reward.functions", "module:function", later),
    Row("custom_reward_function.name", "reward.functions", "", later),
    Row("reward.custom_reward_function.path", "reward.functions", "module:function", later),
    Row("reward.custom_reward_function.name", "reward.functions", "", later),
    *refused("a model as a reward is called from a function of yours", "reward_model.enable"),
    *left("rewards run in a process of their own", "reward_model.*", "reward.*",
          "custom_reward_function.*"),
    Row("trainer.total_epochs", "grpo.num_train_epochs"),
    Row("trainer.total_training_steps", "grpo.max_steps", convert=positive),
    Row("trainer.save_freq", "grpo.save_steps", convert=_interval),
    Row("trainer.test_freq", "grpo.eval_steps", convert=_interval),
    Row("trainer.val_before_train", "grpo.eval_on_start"),
    Row("trainer.max_actor_ckpt_to_keep", "runtime.keep_last", convert=positive),
    Row("trainer.default_local_dir", "runtime.output_dir"),
    Row("trainer.experiment_name", "grpo.run_name"),
    Row("trainer.project_name", "grpo.project"),
    *left("a run writes metrics.jsonl and a report; grpo.report_to names a tracker",
          "trainer.logger", "trainer.log_val_generations"),
    *left("toolkit train --nproc-per-node, or torchrun", "trainer.n_gpus_per_node",
          "trainer.nnodes", "trainer.device"),
    *left("a run is resumed by the same command", "trainer.resume_mode",
          "trainer.resume_from_path"),
    *left("it has no part here", "trainer.*", "ray_init.*", "ray_kwargs.*", "global_profiler.*",
          "hydra.*", "defaults"),
)  # fmt: skip

TABLE = Table(
    form="verl",
    title="verl",
    rows=ROWS,
    defaults=(
        Default("grpo.loss_type", "dapo", "verl's default is token-mean"),
        Default("grpo.lr_scheduler_type", "constant", "verl's default"),
        Default("grpo.weight_decay", 0.01, "verl's default"),
        Default("dataset.prompt", "prompt", "verl's default"),
    ),
    finish=_finish,
)
