"""Checks of from_pretrained: arguments that are rejected with an engine, and warnings without
one.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from toolkit.base.errors import (
    ConfigTypeError,
    ConfigValueError,
    MissingExtraError,
    ToolkitWarning,
    UnsupportedError,
)
from toolkit.config.engine_settings import API_OPTIONS
from toolkit.config.lora_ranks import LEGAL_RANKS
from toolkit.config.supported_features import ENGINE_EXCLUDES
from toolkit.engine.rollout_engine import vllm_available
from toolkit.policy.load_arguments import ENGINE_DEFAULTS, WHERE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from toolkit.policy.load_request import LoadRequest

OPEN = (None, "auto")
"""Values with which vLLM, or the sizing of a run file, decides an option."""

ONE_DEVICE = (None, "sequential", "auto", "balanced")
"""Values of device_map that mean the device of the engine."""


def check_engine(request: LoadRequest) -> None:
    """Reject arguments that cannot be used with an engine on the model.

    Raises:
        UnsupportedError, ConfigValueError, ConfigTypeError: an argument is rejected; the message
            names it.
        MissingExtraError: vLLM is not installed.
    """
    for name, why in (*ENGINE_EXCLUDES.items(), *_API_EXCLUDES.items()):
        if getattr(request, name):
            raise UnsupportedError(
                f"{name} and fast_inference exclude each other: {why}",
                where=WHERE,
                fix=f"remove {name}, or use fast_inference=False",
            )
    if request.device_map not in ONE_DEVICE:
        raise UnsupportedError(
            f"device_map={request.device_map!r}: with fast_inference the model is on the engine's"
            " device",
            where=WHERE,
            fix="remove device_map, and choose the GPU with CUDA_VISIBLE_DEVICES",
        )
    rank = request.engine["max_lora_rank"]
    if rank != "auto" and (type(rank) is not int or rank not in LEGAL_RANKS):
        raise ConfigValueError(
            (
                f"max_lora_rank={rank!r} is not supported by vLLM, which supports "
                f"{', '.join(map(str, LEGAL_RANKS))}"
            ),
            where=WHERE,
            fix=_next_rank(rank),
        )
    share = request.engine["gpu_memory_utilization"]
    if share != "auto" and not (isinstance(share, (int, float)) and 0 < share < 1):
        raise ConfigValueError(
            f"gpu_memory_utilization={share!r} must be between 0 and 1",
            where=WHERE,
            fix='use for example 0.5, or "auto"',
        )
    _check_values(request.engine)
    if not vllm_available():
        raise MissingExtraError(
            "fast_inference=True needs vLLM, which is not installed",
            where=WHERE,
            fix="pip install 'grpo-toolkit[vllm]' on a GPU machine, 'grpo-toolkit[cpu-engine]' on a"
            " CPU, or use fast_inference=False",
        )


def _check_values(engine: Mapping[str, Any]) -> None:
    """Check types here, because vLLM accepts some wrong values or misreads them: a text for a
    switch counts as on.
    """
    for name, option in API_OPTIONS.items():
        value = engine[name]
        if value in OPEN:
            continue
        if option.kind == "count" and (type(value) is not int or value <= 0):
            raise ConfigTypeError(f"{name}={value!r} must be an integer above 0", where=WHERE)
        whole = type(value) is int and value > 0
        if option.kind == "amount" and not (isinstance(value, bool) or whole):
            raise ConfigTypeError(
                f"{name}={value!r} must be True, False, or an integer above 0", where=WHERE
            )
        if option.kind == "switch" and not isinstance(value, bool):
            raise ConfigTypeError(f"{name}={value!r} must be True or False", where=WHERE)


def _next_rank(asked: Any) -> str:
    """The fix for a rank that vLLM does not support."""
    legal = [rank for rank in LEGAL_RANKS if type(asked) is int and rank >= asked]
    return f'use max_lora_rank={legal[0]}, or "auto"' if legal else 'use one of these, or "auto"'


STANDBY = "UNSLOTH_VLLM_STANDBY"
_API_EXCLUDES = {
    "rope_scaling": "the engine reads its positions from the checkpoint",
    "resize_model_vocab": "the engine has the embeddings",
}


def with_standby(arguments: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """``arguments`` of one call, with the effect of the variable UNSLOTH_VLLM_STANDBY: between
    rollouts the trainer may use the memory of the KV cache. ``enable_sleep_mode`` in the call takes
    precedence.
    """
    given = dict(arguments)
    if environ.get(STANDBY, "0").lower() in ("", "0", "false") or "enable_sleep_mode" in given:
        return given
    if not given.get("fast_inference"):
        told = "has no effect with fast_inference=False, because there is no engine"
    else:
        given["enable_sleep_mode"] = True
        told = "is read as enable_sleep_mode=True: the KV cache sleeps while the trainer works"
    warnings.warn(f"{STANDBY} {told}", ToolkitWarning, stacklevel=3)
    return given


def warn_engine_only(engine: Mapping[str, Any]) -> None:
    """Warn of engine options without effect. max_lora_rank and similar options are valid without an
    engine, but unused.
    """
    idle = [name for name, default in ENGINE_DEFAULTS.items() if engine[name] != default]
    if idle:
        warnings.warn(
            f"{', '.join(idle)}: no effect with fast_inference=False, because there is no engine",
            ToolkitWarning,
            stacklevel=5,
        )
