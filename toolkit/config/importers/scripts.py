"""Read the settings in Python scripts and notebooks that train with TRL or Unsloth. The settings
are the arguments of calls such as ``GRPOConfig(...)``. The calls are found with the module ``ast``.
"""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

from toolkit.config.engine_settings import OPTIONS
from toolkit.config.importers.common import (
    NO_ADAPTER,
    convert_dtype,
    convert_targets,
    set_sequence_length,
    set_warmup_steps,
)
from toolkit.config.importers.foreign import Computed, ForeignConfig
from toolkit.config.importers.mapping import (
    Row,
    Table,
    as_list,
    later,
    omit,
    refused,
    rows,
    trl_rows,
)
from toolkit.config.importers.syntax import (
    ConstantNames,
    called_name,
    owner_name,
    parse,
    short_source,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from toolkit.config.importers.mapping import Translation

_FAST_CLASSES = ("FastLanguageModel", "FastModel", "FastVisionModel")
_AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoPeftModelForCausalLM")
# Calls whose keyword arguments are settings: the name of the called object, and the prefix of the
# keys.
_CALL_PREFIXES = {"GRPOConfig": "GRPOConfig", "LoraConfig": "LoraConfig",
          "BitsAndBytesConfig": "BitsAndBytesConfig", "GRPOTrainer": "GRPOTrainer",
          "load_dataset": "load_dataset"}  # fmt: skip
_POSITIONAL_NAMES = {"from_pretrained": ("model_name",), "load_dataset": ("path", "name"),
              "GRPOTrainer": ("model", "reward_funcs", "args", "train_dataset")}  # fmt: skip
_ROW_CHANGES = ("map", "filter", "rename_column", "rename_columns", "train_test_split", "select")
_FILE_FORMATS = ("json", "csv", "parquet", "arrow", "text")
_SAMPLING = "vllm_sampling_params"


def read_script(text: str, location_of: Callable[[int], str] | None = None) -> ForeignConfig:
    """Return the settings in a script. ``location_of`` is a function that converts a line number to
    a position for messages. Raises ValueError if the text is not Python.
    """
    reader = _ScriptReader(parse(text), location_of or (lambda line: f"line {line}"))
    reader.read()
    return reader.foreign


class _ScriptReader:
    def __init__(self, tree: ast.Module, location_of: Callable[[int], str]) -> None:
        self.tree, self.location_of = tree, location_of
        self.names = ConstantNames(tree)
        self.foreign = ForeignConfig("script")
        self.seen_prefixes: set[str] = set()
        self.has_dataset = False

    def read(self) -> None:
        calls = [node for node in ast.walk(self.tree) if isinstance(node, ast.Call)]
        for call in sorted(calls, key=lambda one: (one.lineno, one.col_offset)):
            self.read_call(call)
        self.read_attributes()

    def read_call(self, call: ast.Call) -> None:
        name = called_name(call.func)
        if name == "from_pretrained" and owner_name(call.func) in (
            *_FAST_CLASSES,
            *_AUTO_CLASSES,
        ):
            self.read_arguments(
                call,
                name,
                f"{'FastLanguageModel' if owner_name(call.func) in _FAST_CLASSES else 'AutoModel'}"
                f".{name}",
            )
        elif name == "get_peft_model":
            self.read_arguments(call, name, name)
        elif name in _CALL_PREFIXES:
            self.read_arguments(call, name, _CALL_PREFIXES[name])
        elif name in _ROW_CHANGES and isinstance(call.func, ast.Attribute) and self.has_dataset:
            why = (
                "this code changes the rows of the dataset. Write the changed rows to a file, "
                "or set dataset.prompt to the prompt column of the unchanged rows"
            )
            self.foreign.record_unread(
                self.location_of(call.lineno), f"{short_source(call.func)}(...)", why
            )
        elif name in ("TrlParser", "HfArgumentParser"):
            why = (
                "the settings come from the command line: import that command or its YAML file "
                "instead"
            )
            self.foreign.record_unread(self.location_of(call.lineno), f"{name}(...)", why)

    def read_arguments(self, call: ast.Call, name: str, prefix: str) -> None:
        where = self.location_of(call.lineno)
        if prefix in self.seen_prefixes:
            self.foreign.record_unread(
                where, f"{name}(...)", "only the first such call is converted"
            )
            return
        self.seen_prefixes.add(prefix)
        self.has_dataset |= name == "load_dataset"
        if name in ("get_peft_model", "LoraConfig"):
            self.foreign.add("adapter", True, where)
        for position, value in zip(_POSITIONAL_NAMES.get(name, ()), call.args, strict=False):
            self.read_argument(prefix, position, value)
        for keyword in call.keywords:
            if keyword.arg is None:
                text = f"{name}(**{short_source(keyword.value)})"
                why = "the arguments are put together when the script runs"
                self.foreign.record_unread(self.location_of(keyword.value.lineno), text, why)
            else:
                self.read_argument(prefix, keyword.arg, keyword.value)

    def read_argument(self, prefix: str, name: str, value: ast.expr) -> None:
        where = self.location_of(value.lineno)
        if prefix == "GRPOTrainer":
            self.read_trainer_argument(name, value, where)
        elif name == _SAMPLING:
            self.read_sampling_params(value, where)
        else:
            self.foreign.add(f"{prefix}.{name}", self.names.value(value), where)

    def read_trainer_argument(self, name: str, value: ast.expr, where: str) -> None:
        if name == "reward_funcs":
            assigned = self.names.lookup(value.id) if isinstance(value, ast.Name) else None
            listed = assigned if isinstance(assigned, (ast.List, ast.Tuple)) else value
            items = listed.elts if isinstance(listed, (ast.List, ast.Tuple)) else [listed]
            self.foreign.add("GRPOTrainer.reward_funcs", [_reward(item) for item in items], where)
        elif name == "model":
            constant = self.names.value(value)
            if isinstance(constant, str):
                self.foreign.add("GRPOTrainer.model", constant, where)
        elif name in ("tools", "environment_factory", "rollout_func", "callbacks"):
            self.foreign.add(f"GRPOTrainer.{name}", Computed(short_source(value)), where)

    def read_sampling_params(self, value: ast.expr, where: str) -> None:
        assigned = self.names.lookup(value.id) if isinstance(value, ast.Name) else value
        if not isinstance(assigned, ast.Call):
            self.foreign.record_unread(
                where,
                f"{_SAMPLING}={short_source(value)}",
                "the value is created elsewhere in the script",
            )
            return
        for keyword in assigned.keywords:
            if keyword.arg is not None:
                key = f"{_SAMPLING}.{keyword.arg}"
                self.foreign.add(
                    key, self.names.value(keyword.value), self.location_of(assigned.lineno)
                )

    def read_attributes(self) -> None:
        """Read assignments such as ``training_args.max_steps = 100`` after ``training_args =
        GRPOConfig(...)``.
        """
        for name, attribute, value, line in self.names.attribute_assignments:
            assigned = self.names.lookup(name)
            if isinstance(assigned, ast.Call) and called_name(assigned.func) in (
                "GRPOConfig",
                "LoraConfig",
            ):
                key = f"{called_name(assigned.func)}.{attribute}"
                self.foreign.add(key, self.names.value(value), self.location_of(line))


def _reward(item: ast.expr) -> str:
    if isinstance(item, ast.Constant) and isinstance(item.value, str):
        return item.value
    return short_source(item)


def _add_rewards(translation: Translation) -> None:
    for entry in translation.find_entries("GRPOTrainer.reward_funcs").values():
        for name in map(str, as_list(entry.value)):
            if name.isidentifier():
                translation.add_reward(
                    f"rewards:{name}", f"{entry.location}: {name} is a function of the script"
                )
            else:
                translation.refuse(
                    entry,
                    f"{name} is not the name of a function. Write the reward as a function, and "
                    "use the function's name",
                )
    if translation.reward_modules:
        translation.notes.append(
            "Move the reward functions into a file rewards.py next to this file. A run imports "
            "the module of each reward function, and importing the script itself would start "
            "its training."
        )


def _set_data_path(translation: Translation) -> None:
    path, files = (
        translation.get("dataset.path"),
        translation.foreign_value("load_dataset.data_files"),
    )
    if isinstance(files, dict):
        files = files.get("train", next(iter(files.values()), None))
    if path in _FILE_FORMATS and isinstance(files, str):
        translation.run_values.pop("dataset.path")
        where = translation.find_entries("load_dataset.path")["load_dataset.path"].location
        translation.write(
            "dataset.path", files, f"{where}: load_dataset.path {path}, with data_files"
        )


def _finish(translation: Translation) -> None:
    keys = {entry.key for entry in translation.foreign.entries}
    uses_unsloth = any(key.startswith("FastLanguageModel.") for key in keys)
    if "adapter" not in keys:
        translation.notes.append(f"The script does not create an adapter, but {NO_ADAPTER}.")
    if uses_unsloth and "model.load_in_4bit" not in translation.run_values:
        sets_format = any(
            translation.get(f"model.load_in_{kind}") for kind in ("8bit", "16bit", "fp8")
        )
        if not (sets_format or translation.get("model.full_finetuning")):
            translation.write("model.load_in_4bit", True, "Unsloth's default")
    if uses_unsloth and translation.get("model.fast_inference") is None:
        translation.write(
            "runtime.engine", "transformers", "the default of fast_inference is false in Unsloth"
        )
    _add_rewards(translation)
    _set_data_path(translation)
    _set_warmup(translation)
    set_sequence_length(translation)


def _set_warmup(translation: Translation) -> None:
    set_warmup_steps(translation)
    steps = translation.foreign_value("GRPOConfig.warmup_steps")
    if isinstance(steps, int) and steps > 0:
        translation.write("grpo.warmup_steps", steps, "GRPOConfig.warmup_steps")


def _unsloth_rows() -> Iterator[Row]:
    own = "FastLanguageModel.from_pretrained."
    yield from rows("model", "model_name", "max_seq_length", "load_in_4bit", "load_in_8bit",
                    "load_in_16bit", "load_in_fp8", "full_finetuning", "fast_inference", "revision",
                    "trust_remote_code", "attn_implementation", *OPTIONS, prefix=own)  # fmt: skip
    yield Row(f"{own}dtype", "model.dtype", convert=convert_dtype)
    yield from omit("the toolkit reads this setting from the files of the checkpoint",
                    f"{own}rope_scaling", f"{own}fix_tokenizer",
                    f"{own}use_exact_model_name", f"{own}resize_model_vocab")  # fmt: skip
    yield from omit("each process loads the model onto its own GPU", f"{own}device_map",
                    f"{own}disable_log_stats", f"{own}unsloth_vllm_standby")  # fmt: skip
    yield Row(f"{own}random_state", "lora.random_state")
    yield Row(f"{own}use_gradient_checkpointing", "lora.use_gradient_checkpointing")
    yield Row(f"{own}token", None, "set the environment variable HF_TOKEN instead")
    yield Row(f"{own}*", None, "a run file has no key for this option of Unsloth", refused=True)


def _peft_rows(prefix: str) -> Iterator[Row]:
    yield from rows("lora", "r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "use_dora",
                    "use_gradient_checkpointing", "random_state", "layers_to_transform",
                    "layers_pattern", "exclude_modules", "rank_pattern", "alpha_pattern",
                    "modules_to_save", "init_lora_weights", prefix=prefix)  # fmt: skip
    yield Row(f"{prefix}target_modules", "lora.target_modules", convert=convert_targets)
    yield from omit(
        "the task type is always CAUSAL_LM", f"{prefix}task_type", f"{prefix}inference_mode"
    )
    yield from omit("model.max_seq_length sets the length", f"{prefix}max_seq_length")
    yield from refused("engine and trainer share the base weights, which must not change",
                       f"{prefix}loftq_config")  # fmt: skip
    yield from omit("lora.target_modules chooses the layers", f"{prefix}finetune_vision_layers",
                    f"{prefix}finetune_language_layers", f"{prefix}finetune_attention_modules",
                    f"{prefix}finetune_mlp_modules", f"{prefix}layer_replication",
                    f"{prefix}temporary_location")  # fmt: skip
    yield Row(f"{prefix}*", None, "a run file has no key for this option", refused=True)


def _grpo_rows() -> Iterator[Row]:
    chosen = "the toolkit chooses the value when the run starts"
    for row in trl_rows("GRPOConfig."):
        yield row._replace(computed_reason=row.why or chosen) if row.run_key is None else row


def _sampling_rows() -> Iterator[Row]:
    own = f"{_SAMPLING}."
    yield from rows("grpo", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
                    prefix=own)  # fmt: skip
    for name in ("stop", "stop_token_ids", "min_tokens", "presence_penalty", "frequency_penalty"):
        yield Row(f"{own}{name}", f"grpo.generation_kwargs.{name}")
    yield Row(f"{own}max_tokens", "grpo.max_completion_length")
    yield Row(
        f"{own}seed",
        None,
        "grpo.seed is the seed of sampling",
        computed_reason="grpo.seed is the seed of sampling",
    )
    yield Row(f"{own}include_stop_str_in_output", None, "rewards always get the text without the "
                                                        "stop string",
              refused=True)  # fmt: skip
    yield Row(f"{own}*", None, "a run file has no key for this option", refused=True)


def _other_rows() -> Iterator[Row]:
    auto = "AutoModel.from_pretrained."
    yield Row(f"{auto}model_name", "model.model_name")
    yield Row(f"{auto}pretrained_model_name_or_path", "model.model_name")
    yield Row(f"{auto}torch_dtype", "model.dtype", convert=convert_dtype)
    yield Row(f"{auto}dtype", "model.dtype", convert=convert_dtype)
    yield from rows("model", "revision", "trust_remote_code", "attn_implementation",
                    "load_in_4bit", "load_in_8bit", prefix=auto)  # fmt: skip
    yield from omit("each process loads the model onto its own GPU", f"{auto}device_map",
                    f"{auto}low_cpu_mem_usage", f"{auto}use_cache", f"{auto}token",
                    f"{auto}cache_dir")  # fmt: skip
    yield Row(
        f"{auto}quantization_config",
        None,
        "the arguments of BitsAndBytesConfig are converted instead",
    )
    yield Row(f"{auto}*", None, "a run file has no key for this option", refused=True)
    bits = "BitsAndBytesConfig."
    yield from rows("model", "load_in_4bit", "load_in_8bit", prefix=bits)
    yield Row(f"{bits}*", None, "in this toolkit, 4-bit always means the nf4 format of "
                                "bitsandbytes",
              computed_reason="in this toolkit, 4-bit always means the nf4 format of "
                       "bitsandbytes")  # fmt: skip
    yield Row("GRPOTrainer.model", "model.model_name")
    yield Row("GRPOTrainer.reward_funcs", "reward.functions", convert=later)
    why = (
        "these functions are in the script: move them to a module, and name them in the section "
        "tools"
    )
    yield Row("GRPOTrainer.tools", None, why, refused=True)
    why = (
        "a run file cannot contain an environment factory; the drop-in trainer of the Python API "
        "accepts it"
    )
    yield Row("GRPOTrainer.environment_factory", None, why, refused=True)
    for name in ("rollout_func", "callbacks"):
        yield Row(
            f"GRPOTrainer.{name}",
            None,
            "a run file cannot contain your own rollout function or callbacks",
            refused=True,
        )
    data = "load_dataset."
    yield from rows("dataset", "path", "name", "split", "revision", prefix=data)
    yield Row(f"{data}data_files", "dataset.path", convert=later)
    yield Row(f"{data}*", None, "the dataset is always read completely")
    yield Row("adapter", "lora", "a run always trains an adapter", later)


def _unique_rows(candidates: Iterator[Row]) -> tuple[Row, ...]:
    unique: dict[str, Row] = {}
    for row in candidates:
        unique.setdefault(row.foreign_key, row)
    return tuple(unique.values())


def _all_rows() -> Iterator[Row]:
    yield from _unsloth_rows()
    yield from _peft_rows("get_peft_model.")
    yield from _peft_rows("LoraConfig.")
    yield from _grpo_rows()
    yield from _sampling_rows()
    yield from _other_rows()


TABLE = Table(
    format_name="script",
    title="a TRL or Unsloth script",
    rows=_unique_rows(_all_rows()),
    finish=_finish,
)
