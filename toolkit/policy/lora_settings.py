"""Define the settings of an adapter, and the checks of get_peft_model that do not need PEFT."""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from toolkit.base.errors import (
    ConfigTypeError,
    ConfigValueError,
    ToolkitWarning,
    UnsupportedError,
)
from toolkit.config.libraries import LEGAL_RANKS
from toolkit.config.lora_targets import (
    MLP_PROJECTIONS,
    default_targets,
    expert_targets,
    has_experts,
    layers_beyond,
)
from toolkit.config.run_config import SEVEN_PROJECTIONS
from toolkit.config.supported_features import engine_init_problem
from toolkit.policy.load_arguments import did_you_mean_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from transformers import PreTrainedModel

    from toolkit.config.run_config import LoraSection

WHERE = "get_peft_model"
EMBEDDINGS = ("embed_tokens", "lm_head")
INIT_METHODS = (
    "gaussian",
    "orthogonal",
    "mica",
    "eva",
    "olora",
    "pissa",
    "corda",
    "loftq",
    "lora_ga",
)
"""PEFT's values of init_lora_weights other than True and False. ``pissa_niter_N`` is also valid."""
PISSA_ITERATIONS = r"pissa_niter_\d{1,3}"
"""The pattern of ``pissa_niter_N``. N is at most 999, because more iterations only take more time
(16 are usual).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """The settings of an adapter. An adapted weight is W + s B A, with A (r, in) and B (out, r).

    The scaling s is alpha/r (arXiv 2106.09685), or alpha/sqrt(r) with ``use_rslora`` (arXiv
    2312.03732).
    """

    r: int = 16
    target_modules: tuple[str, ...] | str = SEVEN_PROJECTIONS
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    bias: str = "none"
    layers_to_transform: tuple[int, ...] | int | None = None
    layers_pattern: tuple[str, ...] | str | None = None
    random_state: int = 3407
    use_rslora: bool = False
    modules_to_save: tuple[str, ...] | None = None
    init_lora_weights: bool | str = True
    loftq_config: Mapping[str, Any] | None = None
    use_dora: bool = False
    lora_bias: bool = False
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None
    exclude_modules: tuple[str, ...] | str | None = None
    target_parameters: tuple[str, ...] | None = None
    trainable_token_indices: Any = None

    @classmethod
    def from_section(cls, section: LoraSection) -> LoraSettings:
        """Return the settings of a run file's ``lora`` section."""
        field_names = {f.name for f in fields(cls)}
        names = [f.name for f in fields(section) if f.name in field_names]
        values = {name: getattr(section, name) for name in names}
        for name in ("rank_pattern", "alpha_pattern"):
            values[name] = values[name] or None  # PEFT's config has None instead of an empty dict
        return cls(**values)

    @property
    def scaling(self) -> float:
        """The scaling s, which is alpha/r, or alpha/sqrt(r) with use_rslora."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


def check_settings(settings: LoraSettings) -> None:
    """Check the settings that can be checked without a model.

    Raises:
        ConfigTypeError: r or another number has the wrong type.
        ConfigValueError: a value is invalid.
    """
    r: object = settings.r
    if type(r) is not int:
        raise ConfigTypeError(f"r={r!r} must be an integer, not {type(r).__name__}", where=WHERE)
    if settings.r <= 0:
        raise ConfigValueError(f"r={r} must be larger than 0", where=WHERE)
    alpha: Any = settings.lora_alpha
    dropout: Any = settings.lora_dropout
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise ConfigTypeError(f"lora_alpha={alpha!r} must be a number", where=WHERE)
    if not (math.isfinite(alpha) and alpha > 0):
        raise ConfigValueError(f"lora_alpha={alpha} must be larger than 0", where=WHERE)
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ConfigValueError(f"lora_dropout={dropout!r} must be in [0, 1)", where=WHERE)
    seed: object = settings.random_state
    if type(seed) is not int:
        raise ConfigTypeError(
            f"random_state={settings.random_state!r} must be an integer", where=WHERE
        )
    if settings.bias not in ("none", "all", "lora_only"):
        raise ConfigValueError(
            f'bias={settings.bias!r} must be "none", "all" or "lora_only"', where=WHERE
        )
    _check_init(settings)
    _check_layer_options(settings)
    _check_patterns(settings)


def _check_init(settings: LoraSettings) -> None:
    init: Any = settings.init_lora_weights
    if not isinstance(init, bool) and not (
        isinstance(init, str) and (init in INIT_METHODS or re.fullmatch(PISSA_ITERATIONS, init))
    ):
        hint = did_you_mean_text(init, INIT_METHODS) if isinstance(init, str) else ""
        raise ConfigValueError(
            f"init_lora_weights={init!r} must be one of True, False, {', '.join(INIT_METHODS)}"
            f"{hint}",
            where=WHERE,
        )
    if settings.loftq_config and init != "loftq":
        raise ConfigValueError(
            'loftq_config has no effect without init_lora_weights="loftq"',
            where=WHERE,
            fix='set init_lora_weights="loftq", or remove loftq_config',
        )


def _check_patterns(settings: LoraSettings) -> None:
    for name, minimum in (("rank_pattern", 1), ("alpha_pattern", 0)):
        pattern: Any = getattr(settings, name) or {}
        if not hasattr(pattern, "items"):
            raise ConfigTypeError(f"{name}={pattern!r} must map names to numbers", where=WHERE)
        for key, value in pattern.items():
            is_number = type(value) is int or (minimum == 0 and isinstance(value, float))
            if not is_number or value < minimum or value == 0 or not math.isfinite(value):
                raise ConfigValueError(
                    f"{name}: {key!r} is {value!r}, but must be "
                    f"{'an integer' if minimum else 'a number'} above 0",
                    where=WHERE,
                )
            try:
                re.compile(str(key))
            except re.error as error:
                raise ConfigValueError(
                    f"{name}: {key!r} is not a valid pattern: {error}", where=WHERE
                ) from error


def _check_layer_options(settings: LoraSettings) -> None:
    selects_layers = settings.layers_to_transform is not None or settings.layers_pattern is not None
    if selects_layers and isinstance(settings.target_modules, str):
        raise ConfigValueError(
            "layers_to_transform and layers_pattern cannot be used if target_modules is a string",
            where=WHERE,
            fix="set target_modules to a list of names",
        )
    if settings.layers_pattern is not None and settings.layers_to_transform is None:
        raise ConfigValueError("layers_pattern needs layers_to_transform", where=WHERE)


def check_engine_support(settings: LoraSettings, max_lora_rank: int) -> None:
    """Raise an error if the model's engine does not support a setting. ``max_lora_rank`` is the
    largest rank that the engine supports.

    Raises:
        ConfigValueError: the rank is above ``max_lora_rank``.
        UnsupportedError: the engine does not support another setting.
    """
    largest_rank = max(settings.r, *(settings.rank_pattern or {}).values(), 0)
    if largest_rank > max_lora_rank:
        supported_ranks = [rank for rank in LEGAL_RANKS if rank >= largest_rank]
        rank_text = (
            f"r={settings.r}"
            if largest_rank == settings.r
            else f"rank {largest_rank} in rank_pattern"
        )
        raise ConfigValueError(
            f"{rank_text} is above max_lora_rank={max_lora_rank} of the engine",
            where=WHERE,
            fix=f"load the model with max_lora_rank={supported_ranks[0]}, or use r={max_lora_rank} "
            "or less"
            if supported_ranks
            else (
                f"use r={max_lora_rank} or less, because vLLM does not support ranks above "
                f"{LEGAL_RANKS[-1]}"
            ),
        )
    embeddings = sorted(set(_target_names(settings.target_modules)) & set(EMBEDDINGS))
    unsupported_settings = {
        f"modules_to_save={_as_list(settings.modules_to_save)}": settings.modules_to_save,
        f"training {', '.join(embeddings)}": embeddings,
        f"bias={settings.bias!r}": settings.bias != "none",
        "DoRA (use_dora=True)": settings.use_dora,
        "lora_bias=True": settings.lora_bias,
        "target_parameters": settings.target_parameters,
        "trainable_token_indices": settings.trainable_token_indices,
    }
    for setting, is_set in unsupported_settings.items():
        if is_set:
            raise UnsupportedError(
                f"{setting} is not supported by the engine's LoRA slots, so the engine would "
                "sample completions without it",
                where=WHERE,
                fix="remove the setting that the message names, or load the model with "
                "fast_inference=False",
            )
    wrong_init = engine_init_problem(settings.init_lora_weights)
    if wrong_init is not None:
        raise UnsupportedError(
            f"init_lora_weights: {wrong_init}",
            where=WHERE,
            fix='use init_lora_weights=True or "gaussian", or load the model with '
            "fast_inference=False",
        )
    if settings.lora_dropout:
        warnings.warn(
            f"lora_dropout={settings.lora_dropout}: the engine samples without dropout, so its"
            " log-probabilities differ from the trainer's",
            ToolkitWarning,
            stacklevel=5,
        )


def check_targets(settings: LoraSettings, module_names: Iterable[str]) -> None:
    """Check that every target matches a module of the model. A target is a module's full name, or
    the last parts of the name. A single string is a pattern.

    Raises:
        ConfigValueError: no module has the name of a target. The message suggests the most similar
            name.
    """
    names = [name for name in module_names if name]
    targets = settings.target_modules
    if isinstance(targets, str):
        if targets != "all-linear" and not _matches_any(targets, names):
            raise ConfigValueError(
                f"the pattern target_modules={targets!r} matches no module of the model",
                where=WHERE,
            )
        return
    if not targets and not settings.target_parameters:
        raise ConfigValueError("target_modules is empty", where=WHERE)
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            last_parts = {name.rsplit(".", 1)[-1] for name in names} - {""}
            raise ConfigValueError(
                f"target_modules: the model has no module {target!r}"
                f"{did_you_mean_text(target, last_parts)}",
                where=WHERE,
                fix="use names of linear layers of the model, for example "
                + ", ".join(
                    sorted(last_part for last_part in last_parts if last_part.endswith("_proj"))
                    or ["..."]
                ),
            )


def check_modules_to_save(settings: LoraSettings, module_names: Iterable[str]) -> None:
    """Check that every name in modules_to_save is part of a module's name, because PEFT silently
    ignores other names.

    Raises:
        ConfigValueError: no module has such a name. The message suggests the most similar name.
    """
    names = list(module_names) if settings.modules_to_save else []
    for name in settings.modules_to_save or ():
        if not any(f".{name}." in f".{module}." for module in names):
            last_parts = {module.rsplit(".", 1)[-1] for module in names} - {""}
            raise ConfigValueError(
                f"modules_to_save: the model has no module {name!r}"
                f"{did_you_mean_text(name, last_parts)}",
                where=WHERE,
                fix=f"correct the name {name}, or remove it",
            )


def check_layer_numbers(settings: LoraSettings, num_layers: int | None) -> None:
    """Check that the layers in layers_to_transform exist in a model with ``num_layers`` layers,
    because PEFT silently ignores other layers.

    Raises:
        ConfigValueError: layers do not exist. The message lists them.
    """
    missing = layers_beyond(settings.layers_to_transform, num_layers)
    if missing:
        raise ConfigValueError(
            f"layers_to_transform: {', '.join(map(str, missing))} must be below {num_layers}, the "
            "number of layers of the model (layers are counted from 0)",
            where=WHERE,
            fix=f"use layers from 0 to {(num_layers or 1) - 1}",
        )


def _matches_any(pattern: str, names: list[str]) -> bool:
    try:
        return any(re.fullmatch(pattern, name) for name in names)
    except re.error as error:
        raise ConfigValueError(
            f"target_modules={pattern!r} is not a valid pattern: {error}", where=WHERE
        ) from error


def _target_names(targets: tuple[str, ...] | str) -> tuple[str, ...]:
    if isinstance(targets, str):
        return tuple(name for name in EMBEDDINGS if name in targets)
    return tuple(target.rsplit(".", 1)[-1] for target in targets)


def _as_list(names: Iterable[str] | None) -> list[str]:
    return list(names or ())


def default_targets_of(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the layers that get an adapter if the user names no layers
    (``config.lora_targets.default_targets``).
    """
    return default_targets(model.config.to_dict())


def default_targets_with_warning(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the result of ``default_targets_of``. If the model is a mixture of experts, warn that
    the default has fewer layers than Unsloth's default (seven projections).
    """
    targets = default_targets_of(model)
    if has_experts(model.config.to_dict()):
        warnings.warn(
            "the model is a mixture of experts, so the adapter is only on "
            f"{', '.join(targets)}. Set target_modules to adapt other layers",
            ToolkitWarning,
            stacklevel=4,
        )
    return targets


def targeted_experts(settings: LoraSettings, model: PreTrainedModel) -> frozenset[str]:
    """Return the entries of ``settings.target_modules`` that PEFT applies to the experts of this
    model (a mixture of experts).
    """
    if not has_experts(model.config.to_dict()):
        return frozenset()
    return expert_targets(model.config.model_type, settings.target_modules)


def refuse_experts(expert_targets_found: frozenset[str], where: str) -> None:
    """Raise UnsupportedError if the adapter targets experts. ``expert_targets_found`` has the names
    of these targets. The caller has checked that the model has an engine.
    """
    if expert_targets_found:
        names = ", ".join(name for name in MLP_PROJECTIONS if name in expert_targets_found)
        raise UnsupportedError(
            f"target_modules: {names} are the experts of this model, and the engine has no LoRA"
            " slots for them",
            where=where,
            fix="set target_modules to the attention projections, or load the model with "
            "fast_inference=False",
        )
