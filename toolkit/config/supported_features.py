"""What is supported: stored weight formats, load_in_* flags, architectures, attention, inits.

One table for rules (a finding with its line), sizer (a note), loader, engine and drop-in API (a
refusal). A function here takes plain values and returns the ``Problem``, or None.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toolkit.config.lora_targets import has_experts, text_part

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class Problem:
    """What cannot be served: the key of the run file, why, and values that would do (key, value).

    ``hint`` is what to do where no value alone does it.
    """

    key: str
    message: str
    fixes: tuple[tuple[str, Any], ...] = ()
    hint: str | None = None

    @property
    def advice(self) -> str:
        """All that would help, in the words of the drop-in API."""
        values = [f"{key.rpartition('.')[2]}={value!r}" for key, value in self.fixes]
        return ", or ".join([*values, *([self.hint] if self.hint else [])])


@dataclass(frozen=True, slots=True)
class Stored:
    """A format that checkpoints are stored in. ``flag`` is the load_in_* that trains on it, None
    where nothing does; ``engine`` says whether the vLLM engine shares it.
    """

    name: str
    flag: str | None = None
    engine: bool = False


STORED = {
    "bitsandbytes-4bit": Stored("bitsandbytes 4-bit", "load_in_4bit", engine=True),
    "bitsandbytes-8bit": Stored("bitsandbytes 8-bit", "load_in_8bit"),
    "awq": Stored("AWQ"),
    "gptq": Stored("GPTQ"),
    "fp8": Stored("FP8"),
    "fbgemm_fp8": Stored("FP8 (FBGEMM)"),
    "mxfp4": Stored("MXFP4"),
    "compressed-tensors": Stored("compressed-tensors"),
}

UNTRAINED = {
    "load_in_fp8": "8-bit floating-point weights cannot be trained against here",
}
"""Flags of the drop-in API that are refused whatever else is asked for."""

ENGINE_EXCLUDES = {
    "trust_remote_code": "layers from outside cannot be checked against vLLM's",
    "load_in_8bit": "vLLM's and bitsandbytes' 8-bit weights differ, so they cannot be shared",
    "full_finetuning": "only an adapter is trained on weights that the engine holds",
}
"""Flags that do not go with the vLLM engine, and why."""

MULTIMODAL = frozenset(
    (
        "emu3", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "got_ocr2", "llama4",
        "mllama", "qwen3_5", "qwen3_5_moe", "qwen4_exp",
    )
)  # fmt: skip
"""Causal model types whose language model is a part (transformers 5.17); others say so by a
text_config.
"""

ATTENTIONS = (
    "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3",
    "flash_attention_4",
)  # fmt: skip
"""transformers' attention functions (5.17). With ``paged|`` before it, one is for continuous
batching, which sets it itself: a training pass refuses it.
"""

ATTENTION_PACKAGES = {
    "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
    "flash_attention_4": "flash_attn.cute",
}

DROPS_SOFTCAP = frozenset(("sdpa",))
"""Hugging Face's default takes ``softcap`` among its keywords and computes without it, in silence
(``sdpa_attention_forward``, read at transformers 5.17; held by tests/contract).
"""

REWRITING_INITS = ("pissa", "olora", "corda", "loftq", "eva", "lora_ga")
"""Inits that change the base weights, or need a pass over data with weights of the trainer's
own.
"""

DATA_INITS = {
    "corda": "it needs a pass over data before the adapter is made",
    "eva": "it needs a pass over data before the adapter is made; without one A stays random",
    "lora_ga": "it needs gradients over data before the adapter is made; without them A is random",
    "loftq": "it needs a loftq_config, which a run file does not have",
}
"""Inits that a run file cannot give what they need."""

NO_FLOAT16 = frozenset(("gemma2", "gemma3", "gemma3_text", "glm4"))
"""Model types that vLLM 0.31 does not run in float16, as they overflow there
(config/run_config.py, ``_FLOAT16_NOT_SUPPORTED_MODELS``).
"""

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head sizes of vLLM 0.31's CPU attention (v1/attention/backends/cpu_attn.py)."""

CPU_EXPERT_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "gelu_pytorch_tanh")
"""Activations of experts that ``engine.experts`` computes on a CPU."""


def stored_format(config: Mapping[str, Any]) -> Stored | None:
    """The format that the checkpoint of this config.json is stored in; None for plain weights."""
    inner = config.get("quantization_config")
    if not isinstance(inner, dict):
        return None
    method = str(inner.get("quant_method") or "an unnamed format")
    if method == "bitsandbytes":
        eight = bool(inner.get("load_in_8bit") or inner.get("_load_in_8bit"))
        method = "bitsandbytes-8bit" if eight else "bitsandbytes-4bit"
    return STORED.get(method, Stored(method))


def stored_problem(
    config: Mapping[str, Any], *, load_in_4bit: bool, load_in_8bit: bool, engine: bool
) -> Problem | None:
    """Whether a checkpoint that is stored quantized is trained with these flags."""
    stored = stored_format(config)
    if stored is None:
        return None
    told = f"the checkpoint is stored in {stored.name}"
    if stored.flag is None:
        return Problem(
            "model.model_name",
            f"{told}, and no adapter is trained on that",
            hint="name the checkpoint in 16 bits (load_in_4bit quantizes it while it is loaded)",
        )
    if engine and not stored.engine:
        return Problem(
            "model.model_name",
            f"{told}, which the vLLM engine does not share",
            hint="name the checkpoint in 16 bits, or use runtime.engine: transformers",
        )
    asked = {"load_in_4bit": load_in_4bit, "load_in_8bit": load_in_8bit}
    if not asked.pop(stored.flag):
        return Problem(
            f"model.{stored.flag}",
            f"{told}, and {stored.flag} is false",
            fixes=((f"model.{stored.flag}", True),),
            hint="name the checkpoint in 16 bits",
        )
    for other, on in asked.items():
        if on:
            return Problem(
                f"model.{other}", f"{told}, not for {other}", fixes=((f"model.{other}", False),)
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
    """What is wrong with flags that are on together; that one format alone is chosen is told
    elsewhere.
    """
    found = []
    for name, on in (("load_in_4bit", load_in_4bit), ("load_in_8bit", load_in_8bit)):
        if on and full_finetuning:
            found.append(
                Problem(
                    f"model.{name}",
                    f"full_finetuning and {name} exclude each other: quantized weights have no"
                    " gradient",
                    fixes=((f"model.{name}", False), ("model.full_finetuning", False)),
                )
            )
    if load_in_16bit and dtype == "float32":
        found.append(
            Problem(
                "model.load_in_16bit",
                "load_in_16bit and dtype float32 exclude each other",
                fixes=(("model.load_in_16bit", False), ("model.dtype", "auto")),
            )
        )
    return found


def is_multimodal(config: Mapping[str, Any]) -> bool:
    """Whether the language model is a part of the model of this config.json."""
    return isinstance(config.get("text_config"), dict) or config.get("model_type") in MULTIMODAL


def architecture_problem(
    config: Mapping[str, Any], *, trust_remote_code: bool, known: bool | None, causal: bool | None
) -> Problem | None:
    """Whether the model of this config.json is one that is trained.

    ``known`` and ``causal`` say whether the installed transformers has its model_type, and has it
    as a causal language model; None where that is not known.
    """
    kind, own_code = config.get("model_type"), isinstance(config.get("auto_map"), dict)
    if is_multimodal(config):
        return Problem(
            "model.model_name",
            f"{kind!r} is a multimodal model, and only text models are trained",
            hint="use the text-only checkpoint of the family",
        )
    if own_code and trust_remote_code:
        return None
    if known is False and own_code:
        return Problem(
            "model.trust_remote_code",
            f"the model type {kind!r} is not in the installed transformers: the checkpoint brings"
            " code of its own, and trust_remote_code is false",
            fixes=(("model.trust_remote_code", True),),
            hint="use a model of the installed transformers",
        )
    if known is False:
        return Problem(
            "model.model_name",
            f"the installed transformers does not know the model type {kind!r}",
            hint="correct model_type in config.json, or use a model that it knows",
        )
    if causal is False:
        return Problem(
            "model.model_name",
            f"{kind!r} is no causal language model in the installed transformers",
            hint="name a model that generates text from left to right",
        )
    return None


def attention_problem(
    asked: str | None, *, softcap: float | None, supports: Mapping[str, bool], trusted: bool
) -> Problem | None:
    """Whether ``attn_implementation`` is one, and computes what the model is.

    ``softcap`` is the model's attn_logit_softcapping. ``supports`` says of "sdpa", "flash" and
    "flex" whether the model has them, as far as it is known.
    """
    key = "model.attn_implementation"
    if asked is None:
        return None
    if "/" in asked:
        return (
            None
            if trusted
            else Problem(
                key,
                f"attn_implementation={asked!r} is code from the hub: trust_remote_code is off",
                fixes=((key, None),),
            )
        )
    if asked.startswith("paged|") and (name := asked.removeprefix("paged|")) in ATTENTIONS:
        return Problem(
            key,
            f"attn_implementation={asked!r} is for continuous batching alone, and training cannot"
            " use it",
            fixes=((key, name),),
        )
    if asked not in ATTENTIONS:
        return Problem(
            key,
            f"attn_implementation={asked!r} is none of {', '.join(ATTENTIONS)}",
            fixes=((key, None),),
        )
    if softcap is not None and asked in DROPS_SOFTCAP:
        return Problem(
            key,
            f"attn_implementation={asked!r} leaves out the model's attn_logit_softcapping"
            f" ({softcap:g})",
            fixes=((key, None), (key, "eager"), (key, "flex_attention")),
        )
    kind = next((part for part in ("sdpa", "flash", "flex") if asked.startswith(part)), "eager")
    if supports.get(kind) is False:
        return Problem(
            key, f"this model has no {asked} attention", fixes=((key, None), (key, "eager"))
        )
    return None


def attention_lacks(
    asked: str | None, *, on_gpu: bool, dtype: str, installed: bool
) -> Problem | None:
    """What the machine lacks for a flash attention. ``installed`` is about its package."""
    key, name = "model.attn_implementation", asked or ""
    package = ATTENTION_PACKAGES.get(name)
    if package is None:
        return None
    if not on_gpu:
        lacks = "it needs a GPU"
    elif dtype == "float32":
        lacks = "it computes in 16 bits, and the model is in float32"
    elif not installed:
        lacks = f"its package {package.partition('.')[0]} is not installed"
    else:
        return None
    return Problem(key, f"{name} cannot be used: {lacks}", fixes=((key, None), (key, "sdpa")))


def cpu_engine_problem(config: Mapping[str, Any]) -> Problem | None:
    """Whether vLLM on a CPU runs the model of this config.json."""
    text = text_part(config)
    size = head_size(text)
    if size is not None and size not in CPU_HEAD_SIZES:
        return Problem(
            "model.model_name",
            f"its attention heads have size {size}, and vLLM's CPU attention has"
            f" {', '.join(map(str, CPU_HEAD_SIZES))}",
            fixes=(("runtime.engine", "transformers"),),
        )
    activation = text.get("hidden_act", "silu")
    kind = text.get("model_type")
    if has_experts(text) and (activation not in CPU_EXPERT_ACTIVATIONS or kind == "gpt_oss"):
        what = "experts with biases" if kind == "gpt_oss" else f"experts with {activation}"
        return Problem(
            "model.model_name",
            f"{what} and LoRA run on a GPU only in vLLM",
            fixes=(("runtime.engine", "transformers"),),
        )
    return None


def float16_problem(config: Mapping[str, Any], dtype: str) -> Problem | None:
    """Whether vLLM runs the model of this config.json in ``dtype``."""
    kind = config.get("model_type")
    if dtype != "float16" or kind not in NO_FLOAT16:
        return None
    return Problem(
        "model.dtype",
        f"{kind} overflows in float16, and vLLM does not start with it",
        fixes=(("model.dtype", "bfloat16"), ("runtime.engine", "transformers")),
    )


def head_size(text: Mapping[str, Any]) -> int | None:
    """Values of an attention head; None where it is not known, or attention is latent."""
    if text.get("kv_lora_rank"):
        return None
    size, hidden, heads = (text.get(k) for k in ("head_dim", "hidden_size", "num_attention_heads"))
    if type(size) is int:
        return size
    if type(hidden) is not int or type(heads) is not int or heads <= 0:
        return None
    return hidden // heads


def layers_beyond(layers: Any, count: int | None) -> tuple[int, ...]:
    """Those of ``layers_to_transform`` that a model of ``count`` layers does not have."""
    if count is None or layers is None:
        return ()
    listed = (layers,) if isinstance(layers, int) else tuple(layers)
    return tuple(layer for layer in listed if not 0 <= layer < count)
