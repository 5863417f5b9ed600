"""Generate the run files of test_differential_runs, by a seed, and their models.

A run file sets one key of the schema to a legal value or a limit, or several keys that interact.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

from spoiled_world import RUN

from toolkit.config.schemas import find_schema

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

MODELS_WITH_WEIGHTS = ("dense", "tied", "experts", "softcap")
"""Models with weights. They can be trained."""

QUANTIZED_MODELS: dict[str, dict[str, Any]] = {
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "mxfp4": {"quant_method": "mxfp4"},
    "compressed": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "unnamed": {"bits": 4},
}
"""Model folders with a config.json but no weights, one for each storage format of weights."""

UNUSUAL_MODELS: dict[str, dict[str, Any]] = {
    "multimodal": {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": {"model_type": "gemma3_text", "hidden_size": 64, "num_hidden_layers": 2},
        "vision_config": {"hidden_size": 64},
    },
    "multimodal-by-type": {"model_type": "mllama"},
    "encoder": {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
    "unknown-type": {"model_type": "no_such_model"},
    "own-code": {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "mine.Model"}},
    "small-heads": {"head_dim": 16},
    "no-weights": {},
}
"""Model folders with a config.json but no weights, with unusual architectures."""

# Values that cannot be derived from the lists, types and limits of the schema.
EXTRA_VALUES: dict[str, Sequence[Any]] = {
    "model.attn_implementation": (
        "eager", "sdpa", "flex_attention", "flash_attention_2", "paged|sdpa", "paged|eager", "x",
        "org/kernel",
    ),
    "model.max_seq_length": (2, 8, 32, 256, 257, 4096),
    "model.revision": ("main",),
    "model.max_num_seqs": ("auto", 1, 3, 4, 64),
    "model.max_num_batched_tokens": ("auto", 1, 16, 63, 64, 4096),
    "model.kv_cache_bytes": ("auto", 1, 1 << 16, 1 << 20, 1 << 26),
    "lora.r": (1, 3, 8, 64, 300, 600),
    "lora.lora_alpha": (1, 1000),
    "lora.target_modules": (
        "auto", "all-linear", ["q_proj"], ["q_proj", "v_proj"], ["gate_proj", "down_proj"],
        ["lm_head"], ["embed_tokens"], ["nothing"], ".*_proj", ".*self_attn.*", "(", ["experts"],
        ["gate"], ["layers.0.self_attn.q_proj"], ["norm"],
    ),
    "lora.layers_to_transform": (0, 1, 2, [0], [0, 1], [0, 7], [1, 1]),
    "lora.layers_pattern": ("layers", "blocks", ["layers"], []),
    "lora.exclude_modules": (["q_proj"], ".*proj", ["layers.0.self_attn.q_proj"], ["nothing"], "("),
    "lora.rank_pattern": ({}, {"q_proj": 2}, {"q_proj": 32}, {"nothing": 4}, {"(": 4}),
    "lora.alpha_pattern": ({}, {"q_proj": 64}, {"q_proj": 0.5}, {"nothing": 4}),
    "lora.modules_to_save": (["lm_head"], ["embed_tokens"], ["nothing"], ["q_proj"], ["norm"]),
    "lora.init_lora_weights": (
        True, False, "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora", "eva", "loftq",
        "corda", "lora_ga", "x",
    ),
    "lora.adapter_path": ("no-such-folder", "model"),
    "dataset.path": ("train.jsonl", "eval.jsonl", "missing.jsonl", None),
    "dataset.eval_path": ("eval.jsonl", "train.jsonl", "missing.jsonl"),
    "dataset.split": ("train", "train[:90%]", "train[:50%]", "test"),
    "dataset.eval_split": ("test", "train"),
    "dataset.name": ("main",),
    "dataset.prompt": ("question", "answer", "prompt"),
    "dataset.answer": ("answer", "question", "nothing", None),
    "dataset.system": ("Be short.", ""),
    "dataset.limit": (1, 2, 4, 1000),
    "reward.functions": (
        [], [{"name": "exact_match"}], [{"name": "mine:score", "weight": 0}],
        [{"name": "mine:score"}, {"name": "length_penalty"}], [{"name": "regex_match"}],
        [{"name": "regex_match", "options": {"pattern": "(\\d)"}}], [{"name": "mine:nothing"}],
        [{"name": "numeric_match", "weight": -0.1}], [{"name": "math_verify"}],
        [{"name": "format", "options": {"x": 1}}], [{"name": "other:score"}],
    ),
    "runtime.output_dir": ("out",),
    "runtime.resume": ("auto", "never", "must", "no-such-checkpoint"),
    "runtime.allow_code": (["mine"], [], ["mine", "no_such_module"]),
    "runtime.allow_changed": ([], ["grpo.max_steps"], ["x"]),
    "grpo.max_steps": (1, 2),
    "grpo.per_device_train_batch_size": (1, 2, 4, 6, "auto"),
    "grpo.gradient_accumulation_steps": (1, 2, 3, "auto"),
    "grpo.num_generations": (2, 3, 4, 8),
    "grpo.generation_batch_size": (2, 4, 8, 6),
    "grpo.max_completion_length": (1, 8, 63, 64),
    "grpo.max_prompt_length": (1, 4, 60, 64),
    "grpo.generation_kwargs": (
        {}, {"stop": ["1"]}, {"stop_token_ids": [5]}, {"do_sample": False}, {"max_tokens": 3},
        {"max_new_tokens": 3}, {"temperature": 0.5}, {"seed": 1}, {"n": 2}, {"num_beams": 2},
        {"presence_penalty": 0.5}, {"min_tokens": 2}, {"bad_words": ["1"]}, {"nothing": 1},
        {"logit_bias": {"5": 1.0}}, {"typical_p": 0.5}, {"ignore_eos": True}, {"logprobs": 3},
    ),
    "grpo.chat_template_kwargs": ({}, {"enable_thinking": False}, {"tokenize": True}),
    "grpo.vllm_structured_outputs_regex": ("[0-9]+", "(", "(?<=a)b"),
    "grpo.liger_kernel_config": ({"rope": True}, {}),
    "grpo.transformers_continuous_batching_config": ({}, {"max_memory_percent": 0.5}),
    "grpo.save_steps": (1, 0, 0.5, 1.5, 500),
    "grpo.logging_steps": (0, 1, 0.5, 10),
    "grpo.torch_compile": (False,),  # compilation takes minutes; also for the next two keys
    "grpo.torch_compile_backend": (None, "eager"),
    "grpo.torch_compile_mode": (None,),
    # The value true allocates a cache of most of the memory, which takes a minute.
    "grpo.use_transformers_continuous_batching": (False,),
    "grpo.label_names": (["labels"], []),
    "grpo.use_cpu": (True, False),
}  # fmt: skip

KEY_GROUPS: dict[str, dict[str, Sequence[Any]]] = {
    "formats": {
        "model.load_in_4bit": (True, False),
        "model.load_in_8bit": (True, False),
        "model.load_in_16bit": (True, False),
        "model.load_in_fp8": (True, False),
        "model.full_finetuning": (True, False),
        "model.dtype": ("auto", "float32", "bfloat16", "float16"),
        "model.fast_inference": (True, False, "auto"),
        "model.share_weights": (False,),
        "model.float8_kv_cache": (True,),
        "model.trust_remote_code": (True,),
        "grpo.bf16": (True, False),
        "grpo.fp16": (True, False),
        "grpo.bf16_full_eval": (True,),
        "grpo.cast_lm_head_to_fp32": (True,),
    },
    "adapter": {
        "lora.r": (1, 4, 16),
        "lora.target_modules": EXTRA_VALUES["lora.target_modules"],
        "lora.layers_to_transform": EXTRA_VALUES["lora.layers_to_transform"],
        "lora.layers_pattern": EXTRA_VALUES["lora.layers_pattern"],
        "lora.exclude_modules": EXTRA_VALUES["lora.exclude_modules"],
        "lora.rank_pattern": EXTRA_VALUES["lora.rank_pattern"],
        "lora.alpha_pattern": EXTRA_VALUES["lora.alpha_pattern"],
        "lora.modules_to_save": EXTRA_VALUES["lora.modules_to_save"],
        "lora.init_lora_weights": EXTRA_VALUES["lora.init_lora_weights"],
        "lora.use_dora": (True,),
        "lora.use_rslora": (True,),
        "lora.bias": ("all", "lora_only"),
        "lora.lora_dropout": (0.1,),
        "lora.use_gradient_checkpointing": (True, "auto", "unsloth"),
        "model.max_lora_rank": (1, 8, 64),
        "model.full_finetuning": (True,),
    },
    "batch": {
        "grpo.per_device_train_batch_size": (1, 2, 4, 6, "auto"),
        "grpo.gradient_accumulation_steps": (1, 2, 3, "auto"),
        "grpo.num_generations": (2, 3, 4),
        "grpo.generation_batch_size": (4, 6, 8),
        "grpo.steps_per_generation": (1, 2, 3),
        "grpo.num_iterations": (1, 2),
        "dataset.limit": (1, 2, 5),
        "grpo.dataloader_drop_last": (True,),
        "grpo.auto_find_batch_size": (True,),
        "grpo.max_steps": (-1,),
        "grpo.num_train_epochs": (0.01, 0.1),
    },
    "lengths": {
        "model.max_seq_length": (2, 8, 12, 64, 256, 1000),
        "grpo.max_prompt_length": (1, 4, 8, 60, None),
        "grpo.max_completion_length": (1, 4, 8, 60),
        "dataset.system": ("Answer with a number only.",),
        "dataset.chat": (True, False),
        "grpo.pad_to_multiple_of": (8, 64, "auto"),
        "grpo.mask_truncated_completions": (True,),
    },
    "sampling": {
        "grpo.temperature": (0, 0.001, 0.7, 2),
        "grpo.top_p": (0.001, 0.5, 1),
        "grpo.top_k": (-1, 0, 1, 1000),
        "grpo.min_p": (0, 0.1, 1),
        "grpo.repetition_penalty": (0.5, 1.0, 2.0),
        "grpo.generation_kwargs": EXTRA_VALUES["grpo.generation_kwargs"],
        "grpo.vllm_structured_outputs_regex": EXTRA_VALUES["grpo.vllm_structured_outputs_regex"],
        "grpo.vllm_importance_sampling_correction": (True, False),
        "grpo.vllm_importance_sampling_mode": ("token_truncate", "sequence_mask"),
        "grpo.cache_implementation": ("static", "dynamic"),
    },
    "loss": {
        "grpo.loss_type": ("grpo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
        "grpo.importance_sampling_level": ("token", "sequence"),
        "grpo.beta": (0.1, 0.0),
        "grpo.sync_ref_model": (True,),
        "grpo.top_entropy_quantile": (0, 0.2),
        "grpo.entropy_coef": (0.01,),
        "grpo.use_adaptive_entropy": (True,),
        "grpo.off_policy_mask_threshold": (0.5,),
        "grpo.scale_rewards": ("group", "batch", "none", True, False),
        "grpo.num_iterations": (2,),
        "grpo.use_liger_kernel": (True,),
        "grpo.delta": (0, 1.5),
        "grpo.router_aux_loss_coef": (0.001,),
        "grpo.reward_weights": ([1.0], [1.0, 2.0]),
    },
    "evaluation": {
        "dataset.eval_path": ("eval.jsonl", "train.jsonl"),
        "dataset.eval_limit": (1, 2),
        "grpo.eval_strategy": ("steps", "epoch", "no"),
        "grpo.eval_steps": (1, 0.5),
        "grpo.eval_on_start": (True,),
        "grpo.per_device_eval_batch_size": (1, 3, 4, 8),
        "grpo.num_generations_eval": (1, 2, 3),
        "grpo.save_strategy": ("best", "no", "epoch", "steps"),
        "grpo.save_steps": (1,),
        "grpo.load_best_model_at_end": (True,),
        "grpo.metric_for_best_model": ("eval_reward", "reward", "x"),
        "runtime.keep_best": (1,),
    },
    "engine": {
        "model.max_num_seqs": (1, 4, 64),
        "model.max_num_batched_tokens": (16, 64, 4096),
        "model.enable_chunked_prefill": (True, False),
        "model.enable_prefix_caching": (True, False),
        "model.kv_cache_bytes": (1 << 16, 1 << 22, 1 << 26),
        "model.gpu_memory_utilization": (0.1, 0.9),
        "model.max_seq_length": (12, 64, 256),
        "model.max_loras": (1, 2),
        "model.max_cpu_loras": (1, 2),
        "model.max_lora_rank": (8, 64),
        "model.enable_sleep_mode": (True,),
        "model.enforce_eager": (True,),
        "model.tensor_parallel_size": (1, 2),
        "model.dtype": ("auto", "bfloat16"),
        "lora.r": (4, 16),
    },
}
"""Groups of keys that interact. A run sets two or three keys of one group."""

RUNS_PER_GROUP = {
    "formats": 50,
    "adapter": 70,
    "batch": 40,
    "lengths": 30,
    "sampling": 40,
    "loss": 40,
}
RUNS_PER_OTHER_GROUP = 30
ENGINE_RUNS_PER_GROUP = {"formats": 15, "adapter": 20, "lengths": 8, "sampling": 20, "engine": 20}
ENGINE_SECTIONS = ("model", "lora")
MAX_VALUES = 4
"""The most values of a key that come from the schema; differential_keys has more of some keys."""
MAX_ENGINE_VALUES = 6


@dataclass(frozen=True, slots=True)
class GeneratedRun:
    """A run file: its model, its engine, and the keys that it sets."""

    model: str
    engine: str
    sets: tuple[tuple[str, Any], ...]

    @property
    def description(self) -> str:
        """Model, engine and set keys in one line."""
        sets = " ".join(f"{key}={json.dumps(value)}" for key, value in self.sets)
        return f"{self.model}, {self.engine}: {sets}"

    def text(self) -> str:
        """The run file as JSON."""
        run = {name: dict(section) for name, section in RUN.items()}
        run["grpo"]["max_steps"] = 1
        run["reward"]["isolate"] = False
        run["runtime"]["engine"] = self.engine
        for key, value in self.sets:
            section, _, name = key.partition(".")
            run[section][name] = value
        if "model.fast_inference" in dict(self.sets):
            run["runtime"].pop("engine")
        return json.dumps(run, indent=1)


def key_values(key: str, schema: dict[str, Any]) -> list[Any]:
    """Legal values of a key: from EXTRA_VALUES, or else from its schema, including the limits but
    not the default.
    """
    if key in EXTRA_VALUES:
        return list(EXTRA_VALUES[key])
    legal_values = [*_schema_values(schema), *schema.get("examples", ())]
    unique = {json.dumps(value): value for value in legal_values}
    unique.pop(json.dumps(schema.get("default")), None)
    return list(unique.values())[:MAX_VALUES]


def _schema_values(schema: dict[str, Any]) -> Iterator[Any]:
    for part in schema.get("anyOf", ()):
        yield from _schema_values(part)
    yield from schema.get("enum", ())
    if "const" in schema:
        yield schema["const"]
    kinds = schema.get("type", ())
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if "boolean" in kinds:
        yield from (True, False)
    if "null" in kinds:
        yield None
    if "integer" in kinds and "minimum" in schema:
        yield from (schema["minimum"], schema["minimum"] + 1)
    if "number" in kinds:
        yield from (schema[edge] for edge in ("minimum", "maximum") if edge in schema)
        for edge, step in (("exclusiveMinimum", 1e-6), ("exclusiveMaximum", -1e-6)):
            if edge in schema:
                yield schema[edge] + step
    if "object" in kinds:
        yield {}


def all_keys() -> dict[str, list[Any]]:
    """Every key of a run file with its values, except deprecated keys, the model and the engine."""
    values_by_key = {}
    for section in RUN:
        for name, schema in find_schema("run")["properties"][section]["properties"].items():
            key = f"{section}.{name}"
            if not schema.get("deprecated") and key not in ("model.model_name", "runtime.engine"):
                values_by_key[key] = key_values(key, schema)
    return values_by_key


def sample_settings(
    group: str, count: int, chance: random.Random
) -> Iterator[tuple[tuple[str, Any], ...]]:
    """Yield ``count`` random choices of two or three keys of a group, each with a value."""
    options = KEY_GROUPS[group]
    for _ in range(count):
        chosen = chance.sample(sorted(options), chance.choice((2, 2, 3)))
        yield tuple((key, chance.choice(list(options[key]))) for key in chosen)


def generate(seed: int = 12) -> list[GeneratedRun]:
    """All run files, without duplicates."""
    chance, models = random.Random(seed), cycle(MODELS_WITH_WEIGHTS)
    runs = []
    for key, legal in all_keys().items():
        runs += [GeneratedRun(next(models), "transformers", ((key, value),)) for value in legal]
        if key.partition(".")[0] in ENGINE_SECTIONS:
            some = legal[:MAX_ENGINE_VALUES]
            runs += [GeneratedRun(next(models), "vllm", ((key, value),)) for value in some]
    for group in KEY_GROUPS:
        for sets in sample_settings(group, RUNS_PER_GROUP.get(group, RUNS_PER_OTHER_GROUP), chance):
            runs.append(GeneratedRun(next(models), "transformers", sets))
    for group, count in ENGINE_RUNS_PER_GROUP.items():
        runs += [
            GeneratedRun(next(models), "vllm", sets)
            for sets in sample_settings(group, count, chance)
        ]
    for model in (*QUANTIZED_MODELS, *UNUSUAL_MODELS):
        for engine in ("transformers", "vllm", "auto"):
            runs.append(GeneratedRun(model, engine, ()))
            flags = (("model.load_in_4bit", True), ("model.load_in_8bit", True))
            runs += [GeneratedRun(model, engine, (flag,)) for flag in flags]
            runs.append(GeneratedRun(model, engine, (("model.trust_remote_code", True),)))
    return list({one.description: one for one in runs}.values())


def make_models(root: Path) -> dict[str, Path]:
    """Make the folders of all models; return them by name."""
    import engine_checkpoints
    from tiny_llama import make_tiny, make_tokenizer

    folders = {
        "dense": make_tiny(root / "dense"),
        "tied": make_tiny(root / "tied", tie_word_embeddings=True, chat=True),
        "experts": engine_checkpoints.make_checkpoint(root / "experts", "qwen3_moe"),
        "softcap": engine_checkpoints.make_checkpoint(root / "softcap", "gemma2"),
    }
    plain = json.loads((folders["dense"] / "config.json").read_text())
    configs = {name: plain | {"quantization_config": how} for name, how in QUANTIZED_MODELS.items()}
    for name, how in UNUSUAL_MODELS.items():
        configs[name] = how if "model_type" in how else plain | how
    for name, config in configs.items():
        folders[name] = root / name
        folders[name].mkdir()
        (folders[name] / "config.json").write_text(json.dumps(config))
        make_tokenizer().save_pretrained(folders[name])
    return folders
