"""The table of TRL's keys and of the run file keys that replace them. The keys occur in the YAML
file and on the command line of ``trl grpo`` (ScriptArguments, ModelConfig, DatasetMixtureConfig and
GRPOConfig of TRL 1.16).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.config.importers.common import (
    NO_ADAPTER,
    dtype,
    fit_length,
    module_function,
    split_warmup,
    targets,
)
from toolkit.config.importers.mapping import (
    Default,
    Row,
    Table,
    Unfit,
    later,
    left,
    refused,
    text_list,
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


def rewards(made: Translation, key: str = "reward_funcs") -> None:
    """Add to the run file the reward functions that the setting ``key`` names. The names have the
    same meaning as in TRL's script.
    """
    for entry in made.take(key).values():
        for name in map(str, text_list(entry.value)):
            if name in _REWARDS:
                ours, options, note = _REWARDS[name]
                made.reward(ours, f"{entry.place}: {note}", **options)
                continue
            try:
                made.reward(module_function(name), f"{entry.place}: {name}")
            except Unfit:
                made.refuse(entry, f"no built-in reward corresponds to {name}")


def adapter(made: Translation) -> None:
    """Add a note if use_peft is not true. TRL then trains all weights, but a run of this toolkit
    trains only an adapter.
    """
    if made.value_of("use_peft") is not True:
        made.notes.append(f"The file does not set `use_peft: true`, but {NO_ADAPTER}.")


def _finish(made: Translation) -> None:
    rewards(made)
    adapter(made)
    split_warmup(made)
    fit_length(made)


MODEL_ROWS = (
    Row("model_name_or_path", "model.model_name"),
    Row("model_revision", "model.revision"),
    Row("dtype", "model.dtype", convert=dtype),
    Row("torch_dtype", "model.dtype", convert=dtype),
    Row("attn_implementation", "model.attn_implementation"),
    Row("load_in_4bit", "model.load_in_4bit"),
    Row("load_in_8bit", "model.load_in_8bit"),
    *left(_FROM_BITS, "bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"),
    Row("use_peft", None, "a run always trains an adapter"),
    Row("lora_r", "lora.r"),
    Row("lora_alpha", "lora.lora_alpha"),
    Row("lora_dropout", "lora.lora_dropout"),
    Row("lora_target_modules", "lora.target_modules", convert=targets),
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
    Row("dataset_streaming", None, "the data set is always read completely"),
    Row("datasets.path", "dataset.path"),
    Row("datasets.name", "dataset.name"),
    Row("datasets.split", "dataset.split"),
    Row("datasets.data_files", "dataset.path", "dataset.path can name a file instead of a hub id"),
    *refused("write a file that contains only the rows for the run",
             "datasets.data_dir", "datasets.columns",
             "datasets.fraction", "test_split_size"),
    *left("the data set is always read completely", "streaming"),
)  # fmt: skip
SCRIPT_ROWS = (
    Row("reward_funcs", "reward.functions", convert=later),
    *refused(
        "to use a reward model, call the model from your own reward function",
        "reward_model_name_or_path",
    ),
    *left("this setting is only for debugging", "ignore_bias_buffers"),
    *left("this setting is for the launcher", "config", "accelerate_config", "num_processes"),
)
_OTHERS = {row.old for row in (*MODEL_ROWS, *DATA_ROWS, *SCRIPT_ROWS)}

TABLE = Table(
    form="trl",
    title="TRL",
    rows=(
        *MODEL_ROWS,
        *DATA_ROWS,
        *SCRIPT_ROWS,
        *(row for row in trl_rows() if row.old not in _OTHERS),
    ),
    defaults=(
        Default("lora.lora_alpha", 32, "TRL's default"),
        Default("lora.lora_dropout", 0.05, "TRL's default"),
    ),
    finish=_finish,
)
