"""TRL's GRPOConfig, which here also records which fields the user set.

If the user did not set ``bf16``, TRL 1.16 sets it to True. This module sets ``bf16`` and ``fp16``
from the dtype of the model instead. By default, transformers 5.17 trains on every visible GPU with
``nn.DataParallel``. To prevent this, this module sets the number of GPUs to one.
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
from toolkit.train.error_collector import ErrorCollector
from toolkit.train.legal_batches import refuse_partial_groups
from toolkit.train.older_fields import translate

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

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
        collector = ErrorCollector()
        arguments = {**dict(zip(TRL_FIELDS, args, strict=False)), **kwargs}
        field_values, notes = translate(arguments, (*TRL_FIELDS, *TOOLKIT_FIELDS), collector)
        if notes:
            warnings.warn(f"GRPOConfig: {'; '.join(notes)}", ToolkitWarning, stacklevel=2)
        # In TRL, None means that the field was left out.
        user_fields = frozenset(name for name, value in field_values.items() if value is not None)
        setattr(self, USER_FIELDS_ATTRIBUTE, user_fields)
        for name, (default, check_value) in TOOLKIT_FIELDS.items():
            value = field_values.pop(name, default)
            with collector.collect_error():
                setattr(self, name, check_value(name, value))
        if (
            not field_values.get("fp16")
            and "bf16" not in user_fields
            and not _supports_bfloat16(field_values)
        ):
            field_values["bf16"] = False  # transformers would reject TRL's default True here
        trl_error = None
        try:
            super().__init__(**field_values)
        except ValueError as error:
            if "divisible by" not in str(error) and not collector.errors:
                raise
            trl_error = error
        # Outside of the except block, so that Python does not print TRL's error above this one.
        if trl_error is not None:
            with collector.collect_error():
                _raise_as_config_error(self, user_fields, trl_error)
        collector.raise_errors()
        if trl_error is not None:
            raise trl_error


def _raise_as_config_error(
    config: GRPOConfig, user_fields: frozenset[str], trl_error: ValueError
) -> None:
    """Raise ``trl_error`` as a ConfigValueError, with valid values if they are known."""
    if "divisible by" in str(trl_error):
        refuse_partial_groups(config, user_fields)
    else:
        raise ConfigValueError(str(trl_error), where="GRPOConfig")


def _check_length(name: str, value: object) -> int | None:
    if value is not None and (type(value) is not int or value < 1):
        raise ConfigValueError(
            f"{name}={value!r} must be a number of tokens above 0, or None",
            where="GRPOConfig",
            fix=f"remove {name} to accept prompts of any length that the model supports",
        )
    return value


def _check_bool(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ConfigValueError(
            f"{name}={value!r} must be True or False", where="GRPOConfig", fix=f"set {name}=True"
        )
    return value


def _check_rounds(name: str, value: object) -> int:
    if type(value) is not int or value < 1:
        raise ConfigValueError(
            f"{name}={value!r} must be a number of rounds above 0",
            where="GRPOConfig",
            fix=f"remove {name} to use the default (3 rounds), or set dynamic_sampling=False",
        )
    return value


def _check_share(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ConfigValueError(
            f"{name}={value!r} must be above 0 and at most 1 (a share of each batch)",
            where="GRPOConfig",
            fix=f"remove {name} to use the default (0.5), or set curriculum=False",
        )
    return float(value)


TOOLKIT_FIELDS: dict[str, tuple[Any, Callable[[str, Any], Any]]] = {
    "padding_free": (True, lambda _, value: bool(value)),
    "max_prompt_length": (None, _check_length),
    "dynamic_sampling": (False, _check_bool),
    "max_resample_times": (3, _check_rounds),
    "curriculum": (False, _check_bool),
    "curriculum_share": (0.5, _check_share),
}
"""Fields that TRL's GRPOConfig does not have: (default, function that checks the value)."""


def _supports_bfloat16(field_values: dict[str, Any]) -> bool:
    return bool(field_values.get("use_cpu")) or is_torch_bf16_gpu_available()


def default_config(model: PreTrainedModel) -> GRPOConfig:
    """Return the GRPOConfig of a trainer to which the user passed no ``args``. As in TRL, the
    output folder is named after the model.
    """
    name = model if isinstance(model, str) else str(model.config.name_or_path)
    config: GRPOConfig = GRPOConfig(f"{name.split('/')[-1]}-GRPO")
    return config


def is_set_by_user(config: Any, name: str) -> bool:
    """True if the user set the field ``name`` (``bf16`` or ``fp16``). If ``config`` is a plain
    ``trl.GRPOConfig``, which does not record the fields that the user set, the result is True if
    the value of the field is not TRL's default.
    """
    user_fields = getattr(config, USER_FIELDS_ATTRIBUTE, None)
    if user_fields is not None:
        return name in user_fields
    return bool(getattr(config, name)) != (name == "bf16")


def follow_dtype(config: Any, dtype: torch.dtype, *, engine: bool) -> None:
    """Set ``bf16`` and ``fp16`` of ``config`` to compute in ``dtype``, the dtype of the model. If
    the user set one of these fields to True, nothing is changed.

    Raises:
        ConfigValueError: the user set a dtype that is not the dtype in which the engine samples.
    """
    model_field = HALF_PRECISION_FIELDS.get(dtype)
    user_values = {
        name: bool(getattr(config, name))
        for name in HALF_PRECISION_FIELDS.values()
        if is_set_by_user(config, name)
    }
    for name in (
        name for name, is_on in user_values.items() if is_on and name != model_field and engine
    ):
        engine_dtype = str(dtype).removeprefix("torch.")
        requested_dtype = next(
            str(key).removeprefix("torch.")
            for key, value in HALF_PRECISION_FIELDS.items()
            if value == name
        )
        raise ConfigValueError(
            f"{name}=True computes in {requested_dtype}, but the engine samples in {engine_dtype}",
            where=f"grpo.{name}",
            fix=f"remove {name}, or load the model with dtype={requested_dtype}",
        )
    if any(user_values.values()) or getattr(config, "deepspeed", None):
        return  # DeepSpeed has already read the format
    # Autocast to float16 needs a GPU; without autocast, layers compute in their own dtype.
    enabled_field = (
        None
        if model_field in user_values or (model_field == "fp16" and config.device.type == "cpu")
        else model_field
    )
    config.bf16, config.fp16 = enabled_field == "bf16", enabled_field == "fp16"
    config.mixed_precision = enabled_field or "no"


def use_one_gpu(config: Any) -> None:
    """Make the process train only on the first GPU that CUDA sees. The pre-flight checks
    inspected this GPU.

    Without this function, transformers 5.17 counts all visible GPUs (``TrainingArguments._n_gpu``)
    and wraps the model in ``nn.DataParallel``, which TRL rejects.
    """
    if config.n_gpu > 1:
        config._n_gpu = 1
