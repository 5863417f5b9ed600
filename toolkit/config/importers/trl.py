"""The table of TRL's keys and of the run file keys that replace them. The keys occur in the YAML
file and on the command line of ``trl grpo`` (ScriptArguments, ModelConfig, DatasetMixtureConfig and
GRPOConfig of TRL 1.16).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.config.importers.common import (
    NO_ADAPTER,
    convert_dtype,
    convert_targets,
    function_path,
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

_FROM_BITS = "4-bit always means bitsandbytes' nf4 with double quantization here"
# The rewards that TRL's script provides, and the built-in rewards with the same scores.
_REWARDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "accuracy_reward": ("math_verify", {"column": "solution"}, "TRL's accuracy_reward"),
    "think_format_reward": (
        "format", {"tags": ["think"], "strict": False}, "TRL's think_format_reward",
    ),
}  # fmt: skip


def add_trl_rewards(translation: Translation, key: str = "reward_funcs") -> None:
    """Add to the run file the reward functions that the setting ``key`` names. The names have the
    same meaning as in TRL's script.
    """
    for entry in translation.find_entries(key).values():
        for name in map(str, as_list(entry.value)):
            if name in _REWARDS:
                builtin_name, options, note = _REWARDS[name]
                translation.add_reward(builtin_name, f"{entry.location}: {note}", **options)
                continue
            try:
                translation.add_reward(function_path(name), f"{entry.location}: {name}")
            except UnsupportedValue:
                translation.refuse(entry, f"no built-in reward corresponds to {name}")


def note_missing_adapter(translation: Translation) -> None:
    """Add a note if use_peft is not true. TRL then trains all weights, but a run of this toolkit
    trains only an adapter.
    """
    if translation.foreign_value("use_peft") is not True:
        translation.notes.append(f"The file does not set `use_peft: true`, but {NO_ADAPTER}.")


def _finish(translation: Translation) -> None:
    add_trl_rewards(translation)
    note_missing_adapter(translation)
    set_warmup_steps(translation)
    set_sequence_length(translation)


MODEL_ROWS = (
    Row("model_name_or_path", "model.model_name"),
    Row("model_revision", "model.revision"),
    Row("dtype", "model.dtype", convert=convert_dtype),
    Row("torch_dtype", "model.dtype", convert=convert_dtype),
    Row("attn_implementation", "model.attn_implementation"),
    Row("load_in_4bit", "model.load_in_4bit"),
    Row("load_in_8bit", "model.load_in_8bit"),
    *omit(_FROM_BITS, "bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"),
    Row("use_peft", None, "a run always trains an adapter"),
    Row("lora_r", "lora.r"),
    Row("lora_alpha", "lora.lora_alpha"),
    Row("lora_dropout", "lora.lora_dropout"),
    Row("lora_target_modules", "lora.target_modules", convert=convert_targets),
    Row("lora_modules_to_save", "lora.modules_to_save"),
    Row("lora_task_type", None, "the task type is always CAUSAL_LM"),
    Row("use_rslora", "lora.use_rslora"),
    Row("use_dora", "lora.use_dora"),
    *refused(
        "the engine supports adapters only on layers, not on single parameters",
        "lora_target_parameters",
    ),
)
DATA_ROWS = (
    Row("dataset_name", "dataset.path"),
    Row("dataset_config", "dataset.name"),
    Row("dataset_train_split", "dataset.split"),
    Row("dataset_test_split", "dataset.eval_split"),
    Row("dataset_streaming", None, "the dataset is always read completely"),
    Row("datasets.path", "dataset.path"),
    Row("datasets.name", "dataset.name"),
    Row("datasets.split", "dataset.split"),
    Row("datasets.data_files", "dataset.path", "dataset.path can name a file instead of a hub id"),
    *refused("write a file that contains only the rows for the run",
             "datasets.data_dir", "datasets.columns",
             "datasets.fraction", "test_split_size"),
    *omit("the dataset is always read completely", "streaming"),
)  # fmt: skip
SCRIPT_ROWS = (
    Row("reward_funcs", "reward.functions", convert=later),
    *refused(
        "to use a reward model, call the model from your own reward function",
        "reward_model_name_or_path",
    ),
    *omit("this setting is only for debugging", "ignore_bias_buffers"),
    *omit("this setting is for the launcher", "config", "accelerate_config", "num_processes"),
)
_OWN_KEYS = {row.foreign_key for row in (*MODEL_ROWS, *DATA_ROWS, *SCRIPT_ROWS)}

TABLE = Table(
    format_name="trl",
    title="TRL",
    rows=(
        *MODEL_ROWS,
        *DATA_ROWS,
        *SCRIPT_ROWS,
        *(row for row in trl_rows() if row.foreign_key not in _OWN_KEYS),
    ),
    defaults=(
        Default("lora.lora_alpha", 32, "TRL's default"),
        Default("lora.lora_dropout", 0.05, "TRL's default"),
    ),
    finish=_finish,
)
