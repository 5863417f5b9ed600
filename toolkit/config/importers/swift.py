"""The table of ms-swift's keys and of the run file keys that replace them. The keys occur on the
command line of ``swift rlhf --rlhf_type grpo``, in a YAML file, or in args.json.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from toolkit.config.importers.common import (
    NO_ADAPTER,
    convert_dtype,
    convert_targets,
    function_in_file,
    new_name,
    set_sequence_length,
    set_warmup_steps,
)
from toolkit.config.importers.mapping import (
    Default,
    Row,
    Table,
    UnsupportedValue,
    as_list,
    later,
    omit,
    refused,
    trl_rows,
)

if TYPE_CHECKING:
    from toolkit.config.importers.mapping import Translation

_SERVER = "the engine runs in the training process, so there is no vLLM server"
_TEMPLATE = "the tokenizer's own chat template is used"
_REWARDS: dict[str, tuple[str, dict[str, Any]]] = {
    "accuracy": ("math_verify", {}),
    "format": ("format", {"tags": ["think", "answer"]}),
}
_PROMPTS = ("query", "problem", "question", "messages")


def _dataset_name(value: object) -> str:
    sets = as_list(value)
    if len(sets) != 1:
        raise UnsupportedValue("a run reads only one dataset: join the datasets into one file")
    return str(sets[0]).partition("#")[0].partition(":")[0]


def _is_4bit(value: object) -> bool | None:
    if value in (None, 4):
        return value == 4 or None
    raise UnsupportedValue(
        "quant_bits can be converted only if its value is 4. For 8 bits, set "
        "model.load_in_8bit: true"
    )


def _attention(value: object) -> Any:
    return new_name(value, {"flash_attn": "flash_attention_2"})


def _is_nonzero(value: object) -> bool:
    return value not in (0, None, False)


def _set_data_keys(translation: Translation) -> None:
    for key, limit in (("dataset", "dataset.limit"), ("val_dataset", "dataset.eval_limit")):
        text = str(
            as_list(translation.foreign_value(key, ""))[0] if translation.foreign_value(key) else ""
        )
        count, name = text.partition("#")[2], text.partition("#")[0].partition(":")[2]
        if count.isdigit():
            why = f"{key}: #{count} (the first rows here, random rows in ms-swift)"
            translation.write(limit, int(count), why)
        if name and key == "dataset":
            translation.write("dataset.name", name, f"{key}: :{name}")
    columns = translation.foreign_value("columns")
    if isinstance(columns, str):
        try:
            columns = json.loads(columns)
        except ValueError:
            columns = None
    for old, new in columns.items() if isinstance(columns, dict) else ():
        if new in _PROMPTS:
            translation.write("dataset.prompt", old, f"columns: {old} is {new}")
        elif new == "solution":
            translation.write("dataset.answer", old, f"columns: {old} is {new}")


def _add_rewards(translation: Translation) -> None:
    plugins = as_list(translation.foreign_value("external_plugins", []))
    for entry in translation.find_entries("reward_funcs").values():
        for name in map(str, as_list(entry.value)):
            if name in _REWARDS:
                builtin_name, options = _REWARDS[name]
                translation.add_reward(
                    builtin_name, f"{entry.location}: ms-swift's {name}", **options
                )
            elif plugins:
                try:
                    translation.add_reward(
                        function_in_file(plugins[0], name), f"{entry.location}: {name}"
                    )
                except UnsupportedValue as reason:
                    translation.refuse(entry, str(reason))
                    continue
                translation.notes.append(
                    f"{name} is a class (ORM) in {plugins[0]}. Replace the class by a function "
                    "that takes (prompts, completions, **columns) and returns a list of scores."
                )
            else:
                translation.refuse(entry, f"no built-in reward corresponds to {name}")


def _finish(translation: Translation) -> None:
    _set_data_keys(translation)
    _add_rewards(translation)
    set_warmup_steps(translation)
    if (
        translation.foreign_value("quant_method") not in (None, "bnb")
        and "model.load_in_4bit" in translation.run_values
    ):
        translation.notes.append(
            "In this toolkit, only bitsandbytes can quantize the model (model.load_in_4bit)."
        )
    set_sequence_length(translation)


_OWN_ROWS = (
    *refused("this toolkit supports only GRPO", "rlhf_type", off=("grpo",)),
    *refused(NO_ADAPTER, "train_type", "tuner_type", "sft_type", off=("lora",)),
    Row("model", "model.model_name"),
    Row("model_id_or_path", "model.model_name"),
    Row("model_revision", "model.revision"),
    Row("torch_dtype", "model.dtype", convert=convert_dtype),
    Row("attn_impl", "model.attn_implementation", convert=_attention),
    Row("quant_bits", "model.load_in_4bit", convert=_is_4bit),
    Row("max_length", "grpo.max_prompt_length", "the maximum length of a prompt"),
    Row("vllm_max_model_len", "model.max_seq_length"),
    Row("lora_rank", "lora.r"),
    Row("lora_alpha", "lora.lora_alpha"),
    Row("lora_dropout", "lora.lora_dropout"),
    Row("lora_bias", "lora.bias"),
    Row("target_modules", "lora.target_modules", convert=convert_targets),
    Row("target_regex", "lora.target_modules"),
    Row("modules_to_save", "lora.modules_to_save"),
    Row("use_rslora", "lora.use_rslora"),
    Row("use_dora", "lora.use_dora"),
    Row("init_weights", "lora.init_lora_weights"),
    Row("adapters", "lora.adapter_path", convert=_dataset_name),
    Row("dataset", "dataset.path", convert=_dataset_name),
    Row("val_dataset", "dataset.eval_path", convert=_dataset_name),
    Row("columns", "dataset.prompt", "this setting has the names of the prompt column and the "
                                     "answer column. They become dataset.prompt and "
                                     "dataset.answer",
        convert=later),
    Row("system", "dataset.system"),
    Row("reward_funcs", "reward.functions", convert=later),
    Row("external_plugins", "reward.functions", convert=later),
    Row("enable_thinking", "grpo.chat_template_kwargs.enable_thinking"),
    Row("overlong_filter", "grpo.mask_truncated_completions"),
    Row("tau_pos", "grpo.sapo_temperature_pos"),
    Row("tau_neg", "grpo.sapo_temperature_neg"),
    Row("rollout_importance_sampling_mode", "grpo.vllm_importance_sampling_mode"),
    Row("rollout_importance_sampling_threshold", "grpo.vllm_importance_sampling_clip_max"),
    Row("vllm_enforce_eager", "model.enforce_eager"),
    Row("vllm_enable_prefix_caching", "model.enable_prefix_caching"),
    Row("vllm_max_num_seqs", "model.max_num_seqs"),
    Row("vllm_max_lora_rank", "model.max_lora_rank"),
    Row("vllm_gpu_memory_utilization", None, "the engine shares the GPU with the trainer; use "
                                             "`envcheck size` to compute the value"),
    Row("sleep_level", "model.enable_sleep_mode", convert=_is_nonzero),
    Row("max_resample_times", "grpo.max_resample_times"),
    Row("dynamic_sample", "grpo.dynamic_sampling"),
    *refused("only the advantage of GRPO is supported", "advantage_estimator", off=("grpo",)),
    *refused("the KL term is always added to the loss (grpo.beta), not to the reward",
             "kl_in_reward"),
    *refused("to use a reward model, call the model from your own reward function", "reward_model",
             "reward_model_plugin", "reward_adapters", "teacher_model"),
    *refused("a rollout can have several turns only with the section `tools` or an openenv "
             "environment",
             "multi_turn_scheduler"),
    *refused("your own code that changes models or data is not supported", "custom_register_path"),
    *refused("set dataset.eval_path to the evaluation data", "split_dataset_ratio"),
    *omit("this setting belongs to reward_model",
          "reward_model_type", "reward_model_revision", "teacher_deepspeed"),
    *omit("this setting belongs to multi_turn_scheduler",
          "max_turns", "completion_length_limit_scope"),
    *omit("this setting belongs to kl_in_reward", "log_entropy"),
    *omit(_SERVER, "vllm_server_pass_dataset", "async_generate", "vllm_enable_lora",
          "move_model_batches", "vllm_limit_mm_per_prompt", "infer_backend", "num_infer_workers"),
    *omit("the base weights stay on the GPU, because engine and trainer share them",
          "offload_model",
          "offload_optimizer", "gc_collect_after_offload"),
    *omit(_TEMPLATE, "template", "use_chat_template", "template_backend", "response_prefix",
          "norm_bbox", "agent_template", "loss_scale"),
    *omit("a run always removes tokens at the start of a prompt that is too long, and counts "
          "such prompts",
          "truncation_strategy"),
    *omit("in this toolkit, 4-bit always means the nf4 format of bitsandbytes",
          "quant_method", "bnb_4bit_quant_type",
          "bnb_4bit_compute_dtype", "bnb_4bit_use_double_quant"),
    *omit("the run prepares the data itself", "dataset_num_proc", "load_from_cache_file",
          "dataset_shuffle", "streaming", "strict", "download_mode", "cached_dataset",
          "lazy_tokenize", "shuffle_buffer_size", "split_dataset"),
    *omit("models and data come from the Hugging Face hub; download them first if they are on "
          "ModelScope",
          "use_hf", "model_type", "task_type"),
    *omit("only ms-swift's dataset self-cognition uses this setting",
          "model_author", "model_name"),
    *omit("the trainer packs sequences itself (runtime.padding_free)", "packing", "padding_free"),
    *omit("every GPU has a complete copy of the model",
          "sequence_parallel_size", "device_map", "max_memory"),
    *omit("a run does not use this setting",
          "add_version", "create_checkpoint_symlink", "check_model",
          "ignore_args_error", "load_args", "load_data_args", "tuner_backend", "eval_limit",
          "use_logits_to_keep", "acc_strategy", "config", "log_rollout_offpolicy_metrics",
          "freeze_vit", "freeze_llm", "freeze_aligner", "model_kwargs",
          "vllm_mm_processor_cache_gb"),
)  # fmt: skip
_OWN_KEYS = {row.foreign_key for row in _OWN_ROWS}

TABLE = Table(
    format_name="ms-swift",
    title="ms-swift",
    rows=(*_OWN_ROWS, *(row for row in trl_rows() if row.foreign_key not in _OWN_KEYS)),
    defaults=(
        Default("lora.r", 8, "ms-swift's default"),
        Default("lora.lora_alpha", 32, "ms-swift's default"),
        Default("lora.lora_dropout", 0.05, "ms-swift's default"),
        Default("lora.target_modules", "all-linear", "ms-swift's default"),
        Default("dataset.prompt", "messages", "ms-swift's format"),
        Default("dataset.answer", "solution", "ms-swift's format"),
        Default("grpo.learning_rate", 1e-4, "ms-swift's default for LoRA"),
        Default("grpo.lr_scheduler_type", "cosine", "ms-swift's default"),
        Default("grpo.weight_decay", 0.1, "ms-swift's default"),
        Default("grpo.adam_beta2", 0.95, "ms-swift's default"),
        Default("grpo.beta", 0.04, "ms-swift's default"),
        Default("grpo.temperature", 0.9, "ms-swift's default"),
        Default("grpo.loss_type", "grpo", "ms-swift's default"),
    ),
    finish=_finish,
)
