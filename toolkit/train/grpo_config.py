"""TRL's GRPOConfig, which here also records which fields the user set.

If the user did not set ``bf16``, TRL 1.16 sets it to True. This module sets ``bf16`` and ``fp16``
from the dtype of the model instead. transformers 5.17 would train on every visible GPU with
``nn.DataParallel``. This module sets the number of GPUs to one.
"""

from __future__ import annotations

import warnings
from dataclasses import fields
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
import trl
from transformers.utils import is_torch_bf16_gpu_available

from toolkit.base.errors import ConfigValueError, ToolkitWarning
from toolkit.train.collected import ErrorCollector
from toolkit.train.legal_batches import refuse_partial_groups
from toolkit.train.older_fields import translate

if TYPE_CHECKING:
    from collections.abc import Callable

HALF_PRECISION_FIELDS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
"""For each half-precision dtype, the field of GRPOConfig that switches it on."""
TRL_FIELDS = tuple(field.name for field in fields(trl.GRPOConfig) if field.init)
USER_FIELDS_ATTRIBUTE = "toolkit_written"


class GRPOConfig(trl.GRPOConfig):  # type: ignore[misc]  # TRL ships no types that strict mode can use
    """``trl.GRPOConfig`` that records which fields the user passed. If the user did not pass
    ``bf16`` or ``fp16``, ``follow_dtype`` sets these fields from the dtype of the model.

    The toolkit adds these fields to TRL's (defaults in parentheses):

    - ``padding_free`` (True): train on packed sequences, see ``packed_steps``.
    - ``max_prompt_length`` (None: no limit): keep only the last ``max_prompt_length`` tokens of a
      longer prompt.
    - ``dynamic_sampling`` (False): replace groups whose rewards are all equal, at most
      ``max_resample_times`` (3) times per batch, see ``rollout.dynamic_sampling``.
    - ``curriculum`` (False): prefer prompts whose earlier rewards varied much. They are chosen for
      the share ``curriculum_share`` (0.5) of each batch, see ``rollout.difficulty``.

    Fields of older releases are translated, see ``older_fields``.

    Raises:
        ConfigTypeError: an unknown field.
        ConfigValueError: an invalid value. If a batch does not contain whole groups, the message
            lists valid batch sizes.

    If there are several mistakes, the message lists all of them. The first mistake
    determines the class of the error.
    """

    @wraps(trl.GRPOConfig.__init__)  # type: ignore[misc]  # TRL is untyped
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        mistakes = ErrorCollector()
        named = {**dict(zip(TRL_FIELDS, args, strict=False)), **kwargs}
        given, notes = translate(named, (*TRL_FIELDS, *TOOLKIT_FIELDS), mistakes)
        if notes:
            warnings.warn(f"GRPOConfig: {'; '.join(notes)}", ToolkitWarning, stacklevel=2)
        # In TRL, None means that the field was left out.
        written = frozenset(name for name, value in given.items() if value is not None)
        setattr(self, USER_FIELDS_ATTRIBUTE, written)
        for name, (default, checked) in TOOLKIT_FIELDS.items():
            value = given.pop(name, default)
            with mistakes.check():
                setattr(self, name, checked(name, value))
        if not given.get("fp16") and "bf16" not in written and not _has_bfloat16(given):
            given["bf16"] = False  # transformers would reject TRL's default True here
        refused = None
        try:
            super().__init__(**given)
        except ValueError as problem:
            if "divisible by" not in str(problem) and not mistakes.errors:
                raise
            refused = problem
        # Outside of the except block, so that Python does not print TRL's error above this one.
        if refused is not None:
            with mistakes.check():
                _refuse(self, written, refused)
        mistakes.refuse()
        if refused is not None:
            raise refused


def _refuse(config: GRPOConfig, written: frozenset[str], refused: ValueError) -> None:
    """Raise TRL's error ``refused`` as a ConfigValueError, with valid values if they are known."""
    if "divisible by" in str(refused):
        refuse_partial_groups(config, written)
    else:
        raise ConfigValueError(str(refused), where="GRPOConfig")


def _length(name: str, value: Any) -> int | None:
    if value is not None and (type(value) is not int or value < 1):
        raise ConfigValueError(
            f"{name}={value!r} must be a number of tokens above 0, or None",
            where="GRPOConfig",
            fix=f"remove {name} to accept prompts of any length that the model supports",
        )
    return value


def _switch(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigValueError(
            f"{name}={value!r} must be True or False", where="GRPOConfig", fix=f"set {name}=True"
        )
    return value


def _rounds(name: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ConfigValueError(
            f"{name}={value!r} must be a number of rounds above 0",
            where="GRPOConfig",
            fix=f"remove {name} to use the default (3 rounds), or set dynamic_sampling=False",
        )
    return value


def _share(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ConfigValueError(
            f"{name}={value!r} must be above 0 and at most 1 (a share of each batch)",
            where="GRPOConfig",
            fix=f"remove {name} to use the default (0.5), or set curriculum=False",
        )
    return float(value)


TOOLKIT_FIELDS: dict[str, tuple[Any, Callable[[str, Any], Any]]] = {
    "padding_free": (True, lambda _, value: bool(value)),
    "max_prompt_length": (None, _length),
    "dynamic_sampling": (False, _switch),
    "max_resample_times": (3, _rounds),
    "curriculum": (False, _switch),
    "curriculum_share": (0.5, _share),
}
"""Fields that TRL's GRPOConfig does not have: (default, function that checks the value)."""


def _has_bfloat16(given: dict[str, Any]) -> bool:
    return bool(given.get("use_cpu")) or is_torch_bf16_gpu_available()


def default_config(model: Any) -> GRPOConfig:
    """Return the GRPOConfig of a trainer to which the user passed no ``args``. As in TRL, the
    output folder is named after the model.
    """
    name = model if isinstance(model, str) else str(model.config.name_or_path)
    made: GRPOConfig = GRPOConfig(f"{name.split('/')[-1]}-GRPO")
    return made


def is_set_by_user(config: Any, name: str) -> bool:
    """True if the user set the field ``name`` (``bf16`` or ``fp16``). If ``config`` is a plain
    ``trl.GRPOConfig``, which does not record the fields that the user set, the result is True if
    the value of the field is not TRL's default.
    """
    written = getattr(config, USER_FIELDS_ATTRIBUTE, None)
    if written is not None:
        return name in written
    return bool(getattr(config, name)) != (name == "bf16")


def follow_dtype(config: Any, dtype: torch.dtype, *, engine: bool) -> None:
    """Set ``bf16`` and ``fp16`` of ``config`` to compute in ``dtype``, the dtype of the model. If
    the user set one of these fields to True, nothing is changed.

    Raises:
        ConfigValueError: the user set a dtype that is not the dtype in which the engine samples.
    """
    half = HALF_PRECISION_FIELDS.get(dtype)
    kept = {
        name: bool(getattr(config, name))
        for name in HALF_PRECISION_FIELDS.values()
        if is_set_by_user(config, name)
    }
    for name in (name for name, on in kept.items() if on and name != half and engine):
        told = str(dtype).removeprefix("torch.")
        asked = next(
            str(key).removeprefix("torch.")
            for key, value in HALF_PRECISION_FIELDS.items()
            if value == name
        )
        raise ConfigValueError(
            f"{name}=True computes in {asked}, but the engine samples in {told}",
            where=f"grpo.{name}",
            fix=f"remove {name}, or load the model with dtype={asked}",
        )
    if any(kept.values()) or getattr(config, "deepspeed", None):
        return  # DeepSpeed has already read the format
    # Autocast to float16 needs a GPU; without autocast, layers compute in their own dtype.
    on = None if half in kept or (half == "fp16" and config.device.type == "cpu") else half
    config.bf16, config.fp16 = on == "bf16", on == "fp16"
    config.mixed_precision = on or "no"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def use_one_gpu(config: Any) -> None:
    """Make the process train only on the first GPU that CUDA sees. The pre-flight checks
    inspected this GPU.

    Without this function, transformers 5.17 counts all visible GPUs (``TrainingArguments._n_gpu``)
    and wraps the model in ``nn.DataParallel``, which TRL rejects.
    """
    if config.n_gpu > 1:
        config._n_gpu = 1
