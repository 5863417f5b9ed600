"""Define what the toolkit supports: storage formats of checkpoints, load_in_* flags, architectures,
attention functions, and initializations of adapters.

Each function takes plain values and returns a ``Problem`` or None. A rule reports the problem as a
finding, and the sizer as a note. The loader, the engine and the drop-in API refuse the run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toolkit.config.lora_targets import get_text_config, has_experts

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not supported. ``key`` is the key that requests it, and ``fixes`` are pairs
    (key, value) that would work. ``hint`` says what else the user can do.
    """

    key: str
    message: str
    fixes: tuple[tuple[str, Any], ...] = ()
    hint: str | None = None

    @property
    def advice(self) -> str:
        """The fixes and the hint as one text, with the argument names of the drop-in API."""
        values = [f"{key.rpartition('.')[2]}={value!r}" for key, value in self.fixes]
        return ", or ".join([*values, *([self.hint] if self.hint else [])])


@dataclass(frozen=True, slots=True)
class StorageFormat:
    """A storage format of checkpoints. ``flag`` is the load_in_* flag for training on this format;
    None if that is not supported. ``shares_weights`` says whether trainer and vLLM can share the
    weights.
    """

    name: str
    flag: str | None = None
    shares_weights: bool = False


STORAGE_FORMATS = {
    "bitsandbytes-4bit": StorageFormat("bitsandbytes 4-bit", "load_in_4bit", shares_weights=True),
    "bitsandbytes-8bit": StorageFormat("bitsandbytes 8-bit", "load_in_8bit"),
    "awq": StorageFormat("AWQ"),
    "gptq": StorageFormat("GPTQ"),
    "fp8": StorageFormat("FP8"),
    "fbgemm_fp8": StorageFormat("FP8 (FBGEMM)"),
    "mxfp4": StorageFormat("MXFP4"),
    "compressed-tensors": StorageFormat("compressed-tensors"),
}

UNSUPPORTED_FLAGS = {
    "load_in_fp8": "training on 8-bit floating-point weights is not supported",
}
"""Flags that are always refused, and the reason."""

FLAGS_WITHOUT_ENGINE = {
    "trust_remote_code": "the checkpoint's own layers cannot be compared with vLLM's layers",
    "load_in_8bit": "vLLM's and bitsandbytes' 8-bit weights differ, so they cannot be shared",
    "full_finetuning": "the engine shares the base weights, so only an adapter can be trained",
}
"""Flags that cannot be used together with the vLLM engine, and the reason."""

MULTIMODAL = frozenset(
    (
        "emu3", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "got_ocr2", "llama4",
        "mllama", "qwen3_5", "qwen3_5_moe", "qwen4_exp",
    )
)  # fmt: skip
"""Multimodal model types that transformers 5.17 lists among the causal language models. Other
multimodal models have a text_config in their config.json.
"""

ATTENTION_FUNCTIONS = (
    "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3",
    "flash_attention_4",
)  # fmt: skip
"""The attention functions of transformers 5.17. Names with the prefix ``paged|`` are only for
continuous batching, which sets them itself, and are refused for training.
"""

ATTENTION_PACKAGES = {
    "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
    "flash_attention_4": "flash_attn.cute",
}

NO_CPU_BACKWARD = frozenset(("flex_attention",))
"""Attention functions for which torch 2.13 has no backward pass on a CPU."""

DROPS_SOFTCAP = frozenset(("sdpa",))
"""Attention functions that silently ignore the keyword ``softcap``. transformers' default is one of
them (``sdpa_attention_forward`` of transformers 5.17, checked in tests/contract).
"""

REWRITING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initializations that change the base weights (pissa includes pissa_niter_N)."""

DATA_INITS = {
    "corda": "it requires a pass over data before the adapter is created",
    "eva": "it requires a pass over data before the adapter is created; otherwise A stays random",
    "lora_ga": (
        "it requires gradients over data before the adapter is created; otherwise A stays random"
    ),
    "loftq": "it requires a loftq_config, which a run file cannot set",
}
"""Initializations whose inputs a run file cannot provide, and the reason."""


def engine_init_problem(init: bool | str) -> str | None:
    """Return why the init_lora_weights ``init`` cannot be used with vLLM; None if it can."""
    if not isinstance(init, str):
        return None
    if init.startswith(REWRITING_INITS):
        return f"{init} rewrites base weights, which engine and trainer share"
    return f"{init} cannot be used: {DATA_INITS[init]}" if init in DATA_INITS else None


NO_FLOAT16_TYPES = frozenset(("gemma2", "gemma3", "gemma3_text", "glm4"))
"""Model types that vLLM 0.31 does not run in float16, because their values overflow
(``_FLOAT16_NOT_SUPPORTED_MODELS`` in vLLM's source).
"""

ALWAYS_TIED_TYPES = frozenset(("gemma2",))
"""Model types whose class in vLLM 0.31 has no lm_head: the embedding is always the head."""

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""The head sizes of vLLM 0.31's attention on a CPU (v1/attention/backends/cpu_attn.py)."""

CPU_EXPERT_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "gelu_pytorch_tanh")
"""The activation functions of experts that ``engine.cpu_experts`` can compute on a CPU."""


def storage_format(config: Mapping[str, Any]) -> StorageFormat | None:
    """Return the storage format that config.json states; None if the weights are not quantized."""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict):
        return None
    method = str(quantization.get("quant_method") or "an unnamed format")
    if method == "bitsandbytes":
        is_8bit = bool(quantization.get("load_in_8bit") or quantization.get("_load_in_8bit"))
        method = "bitsandbytes-8bit" if is_8bit else "bitsandbytes-4bit"
    return STORAGE_FORMATS.get(method, StorageFormat(method))


def storage_problem(
    config: Mapping[str, Any], *, load_in_4bit: bool, load_in_8bit: bool, engine: bool
) -> Problem | None:
    """Return the reason why the quantized checkpoint of this config.json cannot be trained with
    these load_in_* flags; None if it can. ``engine`` says whether the run uses vLLM.
    """
    stored = storage_format(config)
    if stored is None:
        return None
    description = f"the checkpoint is stored in {stored.name}"
    if stored.flag is None:
        return Problem(
            "model.model_name",
            f"{description}; training an adapter on this format is not supported",
            hint="name the 16-bit checkpoint of the model (load_in_4bit quantizes it at loading)",
        )
    if engine and not stored.shares_weights:
        return Problem(
            "model.model_name",
            f"{description}, and vLLM cannot share weights in this format",
            hint="name the 16-bit checkpoint of the model, or set runtime.engine: transformers",
        )
    flags = {"load_in_4bit": load_in_4bit, "load_in_8bit": load_in_8bit}
    if not flags.pop(stored.flag):
        return Problem(
            f"model.{stored.flag}",
            f"{description}, but {stored.flag} is false",
            fixes=((f"model.{stored.flag}", True),),
            hint="name the 16-bit checkpoint of the model",
        )
    for other, is_set in flags.items():
        if is_set:
            return Problem(
                f"model.{other}",
                f"{description}, so {other} must be false",
                fixes=((f"model.{other}", False),),
            )
    return None


def flag_problems(
    *,
    load_in_4bit: bool,
    load_in_8bit: bool,
    load_in_16bit: bool,
    full_finetuning: bool,
    dtype: str,
) -> list[Problem]:
    """Return the problems of the combination of these flags. A separate rule checks that only one
    load_in_* flag is set.
    """
    problems = []
    for name, is_set in (("load_in_4bit", load_in_4bit), ("load_in_8bit", load_in_8bit)):
        if is_set and full_finetuning:
            problems.append(
                Problem(
                    f"model.{name}",
                    f"full_finetuning and {name} are mutually exclusive: quantized weights have "
                    "no gradient",
                    fixes=((f"model.{name}", False), ("model.full_finetuning", False)),
                )
            )
    if load_in_16bit and dtype == "float32":
        problems.append(
            Problem(
                "model.load_in_16bit",
                "load_in_16bit and dtype float32 are mutually exclusive",
                fixes=(("model.load_in_16bit", False), ("model.dtype", "auto")),
            )
        )
    return problems


def is_multimodal(config: Mapping[str, Any]) -> bool:
    """Whether the model of this config.json is multimodal, with a language model as one part."""
    return isinstance(config.get("text_config"), dict) or config.get("model_type") in MULTIMODAL


def architecture_problem(
    config: Mapping[str, Any], *, trust_remote_code: bool, known: bool | None, causal: bool | None
) -> Problem | None:
    """Return the reason why the model of this config.json cannot be trained; None if it can.

    ``known`` says whether the installed transformers has the model's model_type. ``causal`` says
    whether transformers has a causal language model of that model_type. None means unknown.
    """
    model_type, has_own_code = config.get("model_type"), isinstance(config.get("auto_map"), dict)
    if is_multimodal(config):
        return Problem(
            "model.model_name",
            f"{model_type!r} is a multimodal model; only text models are supported",
            hint="use a text-only checkpoint of the same model family",
        )
    if has_own_code and trust_remote_code:
        return None
    if known is False and has_own_code:
        return Problem(
            "model.trust_remote_code",
            f"the installed transformers does not have the model type {model_type!r}. The "
            "checkpoint has its own code, but trust_remote_code is false",
            fixes=(("model.trust_remote_code", True),),
            hint="use a model whose type the installed transformers has",
        )
    if known is False:
        return Problem(
            "model.model_name",
            f"the installed transformers does not have the model type {model_type!r}",
            hint="correct model_type in config.json, or use a model whose type transformers has",
        )
    if causal is False:
        return Problem(
            "model.model_name",
            f"{model_type!r} is not a causal language model in the installed transformers",
            hint="name a model that generates text from left to right",
        )
    return None


def attention_problem(
    attn: str | None, *, softcap: float | None, supports: Mapping[str, bool], trusted: bool
) -> Problem | None:
    """Return why a model cannot use the attn_implementation ``attn``; None if it can.

    ``softcap`` is the model's attn_logit_softcapping. ``supports`` says whether the model supports
    "sdpa", "flash" and "flex" (empty if unknown). ``trusted`` is the value of trust_remote_code.
    """
    key = "model.attn_implementation"
    if attn is None:
        return None
    if "/" in attn:
        return (
            None
            if trusted
            else Problem(
                key,
                f"attn_implementation={attn!r} is code from the hub, but trust_remote_code "
                "is false",
                fixes=((key, None),),
            )
        )
    if attn.startswith("paged|") and (name := attn.removeprefix("paged|")) in ATTENTION_FUNCTIONS:
        return Problem(
            key,
            f"attn_implementation={attn!r} is only for continuous batching, which training does "
            "not use",
            fixes=((key, name),),
        )
    if attn not in ATTENTION_FUNCTIONS:
        return Problem(
            key,
            f"attn_implementation={attn!r} is not one of {', '.join(ATTENTION_FUNCTIONS)}",
            fixes=((key, None),),
        )
    if softcap is not None and attn in DROPS_SOFTCAP:
        return Problem(
            key,
            f"attn_implementation={attn!r} ignores the model's attn_logit_softcapping "
            f"({softcap:g})",
            fixes=((key, None), (key, "eager"), (key, "flex_attention")),
        )
    kind = next((part for part in ("sdpa", "flash", "flex") if attn.startswith(part)), "eager")
    if supports.get(kind) is False:
        return Problem(
            key, f"this model has no {attn} attention", fixes=((key, None), (key, "eager"))
        )
    return None


def attention_machine_problem(
    attn: str | None, *, on_gpu: bool, dtype: str, is_installed: bool
) -> Problem | None:
    """Return why this machine cannot use the attention function ``attn``; None if it can.
    ``is_installed`` says whether the package of flash attention is installed.
    """
    key, name = "model.attn_implementation", attn or ""
    if name in NO_CPU_BACKWARD and not on_gpu:
        message = f"{name} cannot be used: torch has no backward pass for it on a CPU"
        return Problem(key, message, fixes=((key, None), (key, "sdpa")))
    package = ATTENTION_PACKAGES.get(name)
    if package is None:
        return None
    if not on_gpu:
        reason = "it needs a GPU"
    elif dtype == "float32":
        reason = "it computes in 16 bits, but the model is in float32"
    elif not is_installed:
        reason = f"its package {package.partition('.')[0]} is not installed"
    else:
        return None
    return Problem(key, f"{name} cannot be used: {reason}", fixes=((key, None), (key, "sdpa")))


def cpu_engine_problem(config: Mapping[str, Any]) -> Problem | None:
    """Return why vLLM cannot run the model of this config.json on a CPU; None if it can."""
    text = get_text_config(config)
    size = head_dim(text)
    if size is not None and size not in CPU_HEAD_SIZES:
        return Problem(
            "model.model_name",
            f"the attention heads have size {size}, but vLLM's CPU attention supports only "
            f"{', '.join(map(str, CPU_HEAD_SIZES))}",
            fixes=(("runtime.engine", "transformers"),),
        )
    activation = text.get("hidden_act", "silu")
    model_type = text.get("model_type")
    if has_experts(text) and (activation not in CPU_EXPERT_ACTIVATIONS or model_type == "gpt_oss"):
        feature = "experts with biases" if model_type == "gpt_oss" else f"experts with {activation}"
        return Problem(
            "model.model_name",
            f"vLLM runs {feature} with LoRA only on a GPU",
            fixes=(("runtime.engine", "transformers"),),
        )
    return None


def float16_problem(config: Mapping[str, Any], dtype: str) -> Problem | None:
    """Return why vLLM cannot run the model in float16; None if it can, or for another ``dtype``."""
    model_type = config.get("model_type")
    if dtype != "float16" or model_type not in NO_FLOAT16_TYPES:
        return None
    return Problem(
        "model.dtype",
        f"{model_type} overflows in float16, so vLLM refuses to start",
        fixes=(("model.dtype", "bfloat16"), ("runtime.engine", "transformers")),
    )


def untied_head_problem(config: Mapping[str, Any]) -> Problem | None:
    """Return why vLLM cannot run the model with its untied lm_head; None if it can."""
    model_type = config.get("model_type")
    if model_type not in ALWAYS_TIED_TYPES or config.get("tie_word_embeddings", True) is not False:
        return None
    message = f"tie_word_embeddings is false, but vLLM has no separate head for {model_type}"
    return Problem("model.model_name", message, fixes=(("runtime.engine", "transformers"),))


def head_dim(text_config: Mapping[str, Any]) -> int | None:
    """Return the size of an attention head; None if it is unknown or the attention is latent."""
    if text_config.get("kv_lora_rank"):
        return None
    size, hidden = text_config.get("head_dim"), text_config.get("hidden_size")
    heads = text_config.get("num_attention_heads")
    if type(size) is int:
        return size
    if type(hidden) is not int or type(heads) is not int or heads <= 0:
        return None
    return hidden // heads
