"""List the parameters of ``FastLanguageModel.from_pretrained`` that need special handling, with
their defaults and the reasons for rejecting them.

No parameter is silently ignored. ``policy.load_request`` uses these tables to apply or reject every
parameter before a model is loaded.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from toolkit.base.did_you_mean import similar_words
from toolkit.base.errors import ConfigTypeError, ConfigValueError
from toolkit.config.engine_settings import API_OPTIONS
from toolkit.config.supported_features import UNSUPPORTED_FLAGS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

WHERE = "FastLanguageModel.from_pretrained"
DTYPES = ("auto", "bfloat16", "float16", "float32")
LOAD_FLAGS = ("load_in_4bit", "load_in_8bit", "load_in_16bit", "load_in_fp8")
CHECKPOINTING_MODES = (True, False, "unsloth", "auto")

ENGINE_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {name: option.api_default for name, option in API_OPTIONS.items()}
)
"""The arguments that only an engine uses, each with its default value."""

REFUSED_ARGUMENTS: Mapping[str, tuple[Any, str, str]] = MappingProxyType(
    {
        "load_in_fp8": (
            False,
            UNSUPPORTED_FLAGS["load_in_fp8"],
            "use load_in_4bit=True or load_in_16bit=True",
        ),
        "qat_scheme": (
            None,
            "quantization-aware training is not supported",
            "remove qat_scheme",
        ),
        "offload_embedding": (
            False,
            "embeddings cannot be offloaded and stay on the model's device",
            "remove offload_embedding",
        ),
    }
)
"""A mapping from a parameter to three values: the only accepted value, the reason why other values
are rejected, and the fix.
"""


def did_you_mean_text(name: str, known_names: Iterable[str]) -> str:
    """Return the text `` (did you mean 'x'?)``, where x is the name in ``known_names`` that is most
    similar to ``name``. If no name is similar, return an empty string.
    """
    matches = similar_words(name, sorted(known_names), cutoff=0.6)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def refuse_unknown(names: Iterable[str], known_names: Iterable[str], where: str) -> None:
    """Raise ConfigTypeError for the first keyword that is not in ``known_names``. The message
    suggests the most similar known keyword.
    """
    known_names = tuple(known_names)
    for name in names:
        if name not in known_names:
            raise ConfigTypeError(
                f"unknown keyword argument {name!r}{did_you_mean_text(name, known_names)}",
                where=where,
                fix=f"correct the name {name}, or remove the argument",
            )


def check_checkpointing(value: object, where: str) -> None:
    """Raise an error if ``value``, the argument ``use_gradient_checkpointing``, is not True, False,
    "unsloth" or "auto".
    """
    if not any(
        value is mode or (isinstance(value, str) and value == mode) for mode in CHECKPOINTING_MODES
    ):
        raise ConfigValueError(
            f"use_gradient_checkpointing={value!r} must be True, False,"
            ' "unsloth" (offloaded) or "auto"',
            where=where,
        )
