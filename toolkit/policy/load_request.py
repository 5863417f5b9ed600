"""Check the arguments of a call of ``FastLanguageModel.from_pretrained``, before a model is loaded,
and store them in a ``LoadRequest``.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from toolkit.base.errors import (
    ConfigTypeError,
    ConfigValueError,
    MissingExtraError,
    ToolkitWarning,
    UnsupportedError,
)
from toolkit.config.engine_settings import API_OPTIONS
from toolkit.config.libraries import LEGAL_RANKS
from toolkit.config.supported_features import FLAGS_WITHOUT_ENGINE, flag_problems
from toolkit.engine.rollout_engine import vllm_available
from toolkit.policy.load_arguments import (
    DTYPES,
    ENGINE_DEFAULTS,
    LOAD_FLAGS,
    REFUSED_ARGUMENTS,
    WHERE,
    check_checkpointing,
    refuse_unknown,
)

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRequest:
    """The checked arguments of a call of ``from_pretrained``. Lengths are in tokens. ``engine`` has
    the arguments that only an engine uses.
    """

    model_name: str
    max_seq_length: int | None = 2048
    dtype: str = "auto"
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    load_in_16bit: bool = False
    full_finetuning: bool = False
    token: str | bool | None = field(default=None, repr=False)
    device_map: Any = "sequential"
    rope_scaling: Mapping[str, Any] | None = None
    fix_tokenizer: bool = True
    trust_remote_code: bool = False
    use_gradient_checkpointing: bool | str = "unsloth"
    resize_model_vocab: int | None = None
    revision: str | None = None
    fast_inference: bool = False
    random_state: int = 3407
    attn_implementation: str | None = None
    fused_kernels: bool | str = "auto"
    use_safetensors: bool = True
    engine: Mapping[str, Any] = field(default_factory=lambda: ENGINE_DEFAULTS)


def check_request(arguments: Mapping[str, Any]) -> LoadRequest:
    """Check the arguments of a call (name -> value) and return a LoadRequest.

    Raises:
        ConfigTypeError: a keyword is unknown, or a value has the wrong type.
        ConfigValueError: a value or a combination of values is invalid.
        UnsupportedError: the request is valid but not supported.
        MissingExtraError: ``fast_inference`` is True, but vLLM is not installed.
    """
    known_names = {
        *LoadRequest.__dataclass_fields__,
        *ENGINE_DEFAULTS,
        *REFUSED_ARGUMENTS,
        *_EXTRA_ARGUMENTS,
    } - {"engine"}
    refuse_unknown(arguments, known_names, WHERE)
    values = dict(arguments)
    for name, (accepted, reason, fix) in REFUSED_ARGUMENTS.items():
        value = values.pop(name, accepted)
        if value != accepted and value is not None:
            raise UnsupportedError(f"{name}={value!r}: {reason}", where=WHERE, fix=fix)
    _apply_extra_arguments(values)
    engine = {name: values.pop(name, default) for name, default in ENGINE_DEFAULTS.items()}
    if values.get("use_safetensors") is None:
        values.pop("use_safetensors", None)
    values["dtype"] = _dtype_name(values.get("dtype"))
    request = LoadRequest(**values, engine=MappingProxyType(engine))
    _check_types(request)
    _check_flags(request)
    if request.fast_inference:
        check_engine_arguments(request)
    else:
        warn_unused_engine_options(engine)
    return request


_EXTRA_ARGUMENTS = ("use_exact_model_name", "text_only", "float32_mixed_precision")


def _apply_extra_arguments(values: dict[str, Any]) -> None:
    """Check the three parameters in ``_EXTRA_ARGUMENTS``, and remove them from ``values``.

    ``use_exact_model_name`` has no effect, because model names are never mapped to other names.
    ``text_only`` has no effect, because only text models are loaded. If ``float32_mixed_precision``
    is True, ``dtype`` is set to float32.
    """
    for name in ("use_exact_model_name", "text_only"):
        value = values.pop(name, False)
        if not isinstance(value, bool):
            raise ConfigTypeError(f"{name}={value!r} must be True or False", where=WHERE)
    mixed_precision = values.pop("float32_mixed_precision", None)
    if mixed_precision not in (None, True, False):
        raise ConfigTypeError(
            f"float32_mixed_precision={mixed_precision!r} must be True, False or None", where=WHERE
        )
    if mixed_precision:
        if _dtype_name(values.get("dtype")) not in ("auto", "float32") or values.get(
            "load_in_16bit"
        ):
            raise ConfigValueError(
                (
                    "float32_mixed_precision=True keeps float32 weights, but the call sets "
                    "another dtype"
                ),
                where=WHERE,
                fix="remove dtype and load_in_16bit, or remove float32_mixed_precision",
            )
        values["dtype"] = "float32"


def _dtype_name(dtype: Any) -> str:
    name = "auto" if dtype is None else str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigValueError(
            f"dtype={dtype!r} is not one of {', '.join(DTYPES)}",
            where=WHERE,
            fix="pass dtype=None, so that the dtype is chosen for the device",
        )
    return name


def _check_types(request: LoadRequest) -> None:
    """Raise an error if a value has the wrong type. ``max_seq_length`` is in tokens."""
    if not request.model_name:
        raise ConfigValueError("model_name is empty", where=WHERE, fix="pass a folder or a hub id")
    for name in (
        *LOAD_FLAGS[:3],
        "full_finetuning",
        "fix_tokenizer",
        "trust_remote_code",
        "fast_inference",
    ):
        if not isinstance(getattr(request, name), bool):
            raise ConfigTypeError(
                f"{name}={getattr(request, name)!r} must be True or False", where=WHERE
            )
    for name in ("max_seq_length", "resize_model_vocab"):
        value = getattr(request, name)
        if value is not None and (type(value) is not int or value <= 0):
            raise ConfigTypeError(f"{name}={value!r} must be an integer above 0", where=WHERE)
    if type(request.random_state) is not int:
        raise ConfigTypeError(
            f"random_state={request.random_state!r} must be an integer", where=WHERE
        )
    check_checkpointing(request.use_gradient_checkpointing, WHERE)
    if request.fused_kernels not in (True, False, "auto"):
        raise ConfigTypeError(
            f"fused_kernels={request.fused_kernels!r} must be True, False or 'auto'", where=WHERE
        )


def _check_flags(request: LoadRequest) -> None:
    """Raise an error if more than one ``load_in_*`` argument is True, or if a quantized format is
    combined with full fine-tuning.
    """
    formats = [name for name in LOAD_FLAGS[:3] if getattr(request, name)]
    hint = "load_in_4bit is True by default, so pass load_in_4bit=False for another format"
    if len(formats) > 1:
        raise ConfigValueError(
            f"{' and '.join(formats)} cannot be used together",
            where=WHERE,
            fix=f"set only one load_in_* argument to True. {hint}",
        )
    for problem in flag_problems(
        load_in_4bit=request.load_in_4bit,
        load_in_8bit=request.load_in_8bit,
        load_in_16bit=request.load_in_16bit,
        full_finetuning=request.full_finetuning,
        dtype=request.dtype,
    ):
        raise ConfigValueError(problem.message, where=WHERE, fix=problem.advice)


SINGLE_DEVICE_MAPS = (None, "sequential", "auto", "balanced")
"""The values of device_map that are accepted with an engine. The model is then on the engine's
device.
"""


def check_engine_arguments(request: LoadRequest) -> None:
    """Reject arguments that cannot be used together with an engine.

    Raises:
        UnsupportedError, ConfigValueError, ConfigTypeError: an argument is rejected. The message
            names the argument.
        MissingExtraError: vLLM is not installed.
    """
    for name, reason in (*FLAGS_WITHOUT_ENGINE.items(), *_API_ENGINE_EXCLUDES.items()):
        if getattr(request, name):
            raise UnsupportedError(
                f"{name} and fast_inference cannot be used together, because {reason}",
                where=WHERE,
                fix=f"remove {name}, or use fast_inference=False",
            )
    if request.device_map not in SINGLE_DEVICE_MAPS:
        raise UnsupportedError(
            f"device_map={request.device_map!r} is not supported with fast_inference, because the"
            " model is on the engine's device",
            where=WHERE,
            fix="remove device_map, and choose the GPU with CUDA_VISIBLE_DEVICES",
        )
    _check_engine_types(request.engine)
    if not vllm_available():
        raise MissingExtraError(
            "fast_inference=True needs vLLM, which is not installed",
            where=WHERE,
            fix="run `pip install 'grpo-toolkit[vllm]'` on a GPU machine, or `pip install "
            "'grpo-toolkit[cpu-engine]'` on a CPU, or use fast_inference=False",
        )


def _check_engine_types(engine: Mapping[str, Any]) -> None:
    """Check the types of the engine arguments. vLLM itself accepts some wrong values and
    misinterprets them. For example, any text counts as True.
    """
    for name, option in API_OPTIONS.items():
        value = engine[name]
        if value == "auto" or (value is None and option.api_default is None):
            continue
        if option.kind == "count" and (type(value) is not int or value <= 0):
            raise ConfigTypeError(f"{name}={value!r} must be an integer above 0", where=WHERE)
        is_count = type(value) is int and value > 0
        if option.kind == "amount" and not (isinstance(value, bool) or is_count):
            raise ConfigTypeError(
                f"{name}={value!r} must be True, False, or an integer above 0", where=WHERE
            )
        if option.kind == "rank" and (type(value) is not int or value not in LEGAL_RANKS):
            raise ConfigValueError(
                f"{name}={value!r} is not supported by vLLM, which supports only the ranks "
                f"{', '.join(map(str, LEGAL_RANKS))}",
                where=WHERE,
                fix=_rank_advice(name, value),
            )
        is_share = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1
        if option.kind == "share" and not is_share:
            raise ConfigValueError(
                f"{name}={value!r} must be between 0 and 1",
                where=WHERE,
                fix=f'set {name} to a number such as 0.5, or to "auto"',
            )
        if option.kind == "switch" and not isinstance(value, bool):
            raise ConfigTypeError(f"{name}={value!r} must be True or False", where=WHERE)


def _rank_advice(name: str, requested: Any) -> str:
    """Return the advice for the user if vLLM does not support the rank ``requested``: another rank,
    or "auto".
    """
    supported_ranks = [rank for rank in LEGAL_RANKS if type(requested) is int and rank >= requested]
    return (
        f'use {name}={supported_ranks[0]}, or "auto"'
        if supported_ranks
        else 'use one of these ranks, or "auto"'
    )


STANDBY_VARIABLE = "UNSLOTH_VLLM_STANDBY"
_API_ENGINE_EXCLUDES = {
    "rope_scaling": "the engine reads the position settings from the checkpoint",
    "resize_model_vocab": "the model shares the engine's embeddings, which cannot be resized",
}


def apply_standby_variable(
    arguments: Mapping[str, Any], environ: Mapping[str, str]
) -> dict[str, Any]:
    """Return ``arguments``, with ``enable_sleep_mode`` set if the environment variable
    UNSLOTH_VLLM_STANDBY is set. In sleep mode the trainer can use the memory of the KV cache
    between rollouts. If the call itself has ``enable_sleep_mode``, the variable has no effect.
    """
    result = dict(arguments)
    if (
        environ.get(STANDBY_VARIABLE, "0").lower() in ("", "0", "false")
        or "enable_sleep_mode" in result
    ):
        return result
    if not result.get("fast_inference"):
        effect = "has no effect with fast_inference=False, because there is no engine"
    else:
        result["enable_sleep_mode"] = True
        effect = (
            "is read as enable_sleep_mode=True: the memory of the KV cache is released while the "
            "trainer works"
        )
    warnings.warn(f"{STANDBY_VARIABLE} {effect}", ToolkitWarning, stacklevel=3)
    return result


def warn_unused_engine_options(engine: Mapping[str, Any]) -> None:
    """Warn if engine options are set that have no effect because the model has no engine. Such
    options, for example max_lora_rank, are valid but unused.
    """
    unused = [name for name, default in ENGINE_DEFAULTS.items() if engine[name] != default]
    if unused:
        warnings.warn(
            "these options have no effect with fast_inference=False, because there is no engine: "
            f"{', '.join(unused)}",
            ToolkitWarning,
            stacklevel=5,
        )
