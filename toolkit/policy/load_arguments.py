"""Every parameter of ``FastLanguageModel.from_pretrained``: honoured, or refused by name. Nothing
is silently dropped.

The tables say which is which; ``policy.request`` applies them before anything is loaded.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from toolkit.base.did_you_mean import near
from toolkit.base.errors import ConfigTypeError, ConfigValueError
from toolkit.config.engine_settings import API_OPTIONS
from toolkit.config.supported_features import UNTRAINED

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

WHERE = "FastLanguageModel.from_pretrained"
DTYPES = ("auto", "bfloat16", "float16", "float32")
LOAD_FLAGS = ("load_in_4bit", "load_in_8bit", "load_in_16bit", "load_in_fp8")
CHECKPOINTING = (True, False, "unsloth", "auto")

ENGINE_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {name: option.api for name, option in API_OPTIONS.items()}
)
"""What only an engine reads, with the value that means "not asked for"."""

REFUSED: Mapping[str, tuple[Any, str, str]] = MappingProxyType(
    {
        "load_in_fp8": (
            False,
            UNTRAINED["load_in_fp8"],
            "use load_in_4bit=True or load_in_16bit=True",
        ),
        "qat_scheme": (
            None,
            "quantization-aware training is not supported",
            "leave qat_scheme out",
        ),
        "offload_embedding": (
            False,
            "embeddings stay on the device of the model",
            "leave offload_embedding out",
        ),
    }
)
"""Parameter -> (the value that asks for nothing, why any other is refused, what to do)."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the known name nearest to ``name``, or nothing."""
    match = near(name, sorted(known), cutoff=0.6)
    return f" (did you mean {match[0]!r}?)" if match else ""


def refuse_unknown(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise ConfigTypeError for the first keyword that ``where`` does not know, naming the nearest
    that it does.
    """
    known = tuple(known)
    for name in given:
        if name not in known:
            raise ConfigTypeError(
                f"unknown keyword argument {name!r}{nearest(name, known)}",
                where=where,
                fix="correct its name or leave it out",
            )


def check_checkpointing(value: Any, where: str) -> None:
    """Refuse a ``use_gradient_checkpointing`` that is none of True, False, "unsloth", "auto"."""
    if not any(
        value is known or (isinstance(value, str) and value == known) for known in CHECKPOINTING
    ):
        raise ConfigValueError(
            f"use_gradient_checkpointing={value!r} must be True, False,"
            ' "unsloth" (offloaded) or "auto"',
            where=where,
        )
