"""The adapter under training. Only this module, ``lora_layer`` and ``engine.adapter`` import PEFT.

Adapter weights are float32 whatever the base is (PEFT's own default): Adam's steps on a bfloat16
adapter, with its 8 bits of mantissa, are lost below 1/256 of the weight, and its moments would be
bfloat16 too. The forward pass computes in the base's dtype under autocast, as the engine does.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    PeftModelForCausalLM,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer

from toolkit.base.errors import (
    ConfigError,
    ConfigTypeError,
    ConfigValueError,
    ToolkitWarning,
    UnsupportedError,
    first_line,
)
from toolkit.engine.shards import part, whole
from toolkit.policy.adapted_layers import experts_of, refuse_experts
from toolkit.policy.lora_layer import use_fast_layers
from toolkit.policy.lora_settings import (
    WHERE,
    LoraSettings,
    check_layers,
    check_saved,
    check_settings,
    check_targets,
    check_with_engine,
)
from toolkit.policy.model_files import ADAPTER_CONFIG

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

NOT_PEFTS = ("random_state",)
KEPT = ("base_model_name_or_path", "revision", "fan_in_fan_out")
BOOKKEEPING = (*KEPT, "peft_type", "task_type", "peft_version", "inference_mode", "auto_mapping")
"""Fields of adapter_config.json that shape nothing; any other that is set must be one of ours."""

MAPPINGS = ("loftq_config", "rank_pattern", "alpha_pattern")
DIFFERING = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "bias",
    "use_rslora",
    "use_dora",
    "init_lora_weights",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "lora_bias",
)
"""What makes one adapter another; the order is that in which differences are told."""


def add_lora(model: Any, settings: LoraSettings) -> Any:
    """``model`` (a transformers model) with a fresh adapter: a ``peft.PeftModelForCausalLM``.

    B = 0, so no logit changes; A is drawn from ``settings.random_state`` alone, on the CPU, so the
    same seed gives the same bytes on every device, and the caller's generators are left as they
    were.

    Raises:
        ConfigTypeError, ConfigValueError, UnsupportedError: the refusals of ``policy.settings``.
    """
    check_settings(settings)
    engine = getattr(model, "toolkit_engine", None)
    experts = experts_of(settings, model)
    config = to_peft(settings)
    if engine is not None:
        refuse_unserved(model, config, engine, WHERE)
    check_targets(settings, (*(name for name, _ in model.named_modules()), *experts))
    check_saved(settings, (name for name, _ in model.named_modules()))
    check_layers(settings, getattr(model.config.get_text_config(), "num_hidden_layers", None))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.random_state)
        try:
            return get_peft_model(model, use_fast_layers(config))
        except ValueError as error:
            raise ConfigValueError(str(error).strip(), where=WHERE) from error


def to_peft(settings: LoraSettings) -> Any:
    """The ``peft.LoraConfig`` of ``settings``."""
    values: dict[str, Any] = {}
    for item in fields(settings):
        value = getattr(settings, item.name)
        if item.name in NOT_PEFTS or (item.name in MAPPINGS and not value):
            continue
        values[item.name] = _plain(value)
    try:
        return LoraConfig(task_type="CAUSAL_LM", **values)
    except (ValueError, ImportError) as error:
        raise ConfigValueError(str(error).strip(), where=WHERE) from error


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if hasattr(value, "items") else value


def is_peft(model: Any) -> bool:
    """True if ``model`` already carries an adapter."""
    return isinstance(model, PeftModel)


def same_or_refuse(model: Any, settings: LoraSettings) -> Any:
    """``model``, which already has an adapter, if ``settings`` ask for the very same one.

    Raises:
        ConfigTypeError: they ask for another; the differences are named.
    """
    check_settings(settings)
    different = differences(model.peft_config["default"], settings)
    if different:
        raise ConfigTypeError(
            "the model already has an adapter with other settings: " + "; ".join(different),
            where=WHERE,
            fix="load the model again, or ask for the same settings",
        )
    warnings.warn(
        "the model already has this adapter: returned as it is", ToolkitWarning, stacklevel=4
    )
    return model


def differences(
    current: Any, settings: LoraSettings, names: Iterable[str] = DIFFERING
) -> list[str]:
    """How the ``peft.LoraConfig`` ``current`` differs from ``settings``, a sentence a field."""
    asked = to_peft(settings)
    pairs = [(name, _plain_set(current, name), _plain_set(asked, name)) for name in names]
    return [f"{name} is {is_!r}, asked for {to!r}" for name, is_, to in pairs if is_ != to]


def _plain_set(config: Any, name: str) -> Any:
    """A field's value, with the order of names and the kinds of nothing taken out."""
    value = getattr(config, name)
    if isinstance(value, (set, list, tuple)):
        return sorted(value) or None
    return value or None if isinstance(value, dict) else value


def adapter_tensors(model: Any, name: str = "default") -> dict[str, torch.Tensor]:
    """The adapter's tensors under the names that its file has, on their device, not copied; where
    processes share a model, put together from their parts, and all of them call it.
    """
    tensors: dict[str, torch.Tensor] = get_peft_model_state_dict(
        model, adapter_name=name, save_embedding_layers=False
    )
    cut = _parameters(model, name)
    return {key: whole(tensor, cut.get(key)) for key, tensor in tensors.items()}


def _parameters(model: Any, name: str) -> dict[str, torch.Tensor]:
    """The parameters of an adapter under the names that its file has."""
    own = ((key.replace(f".{name}.", "."), value) for key, value in model.named_parameters())
    return {key: value for key, value in own if "lora_" in key}


def set_adapter_tensors(
    model: Any, tensors: Mapping[str, torch.Tensor], name: str = "default"
) -> None:
    """Write ``tensors`` (checked against ``adapter_tensors`` by the caller) into the adapter."""
    cut = _parameters(model, name)
    own = {k: part(v, cut[k]) if k in cut else v for k, v in tensors.items()}
    set_peft_model_state_dict(model, own, adapter_name=name)


@torch.no_grad()
def merge(model: Any, name: str = "default") -> Any:
    """The base model with the adapter ``name`` added into its weights: in float32, rounded once.

    PEFT's own merge rounds the update before it adds it; it serves the layers that are not plain.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not all(_is_plain(layer, name) for layer in layers):
        return model.merge_and_unload(safe_merge=True, adapter_names=[name])
    for layer in layers:
        if name in layer.lora_A:
            weight = layer.get_base_layer().weight
            weight.copy_(weight.float() + layer.get_delta_weight(name).float())
    return model.unload()


def _is_plain(layer: Any, name: str) -> bool:
    """True if all that the adapter does to ``layer`` is s B A on its weight."""
    if name in layer.lora_embedding_A or hasattr(layer, "parameter_name"):
        return False
    if name not in layer.lora_A:
        return True
    return layer.lora_variant.get(name) is None and layer.lora_B[name].bias is None


def refuse_unserved(model: Any, config: Any, engine: Any, where: str) -> None:
    """Refuse an adapter that the ``engine`` on ``model`` cannot sample from, or that would change
    the weights that both share. ``config`` is any ``peft.PeftConfig``, whoever made it.

    An engine without LoRA slots of its own samples from the trained model itself: it serves all.

    Raises:
        UnsupportedError, ConfigValueError, ConfigTypeError: naming the option.
    """
    options = getattr(engine, "options", None)
    if options is None:
        return
    try:
        _refuse_kind(config)
        settings = settings_of(config)
        check_settings(settings)
        check_with_engine(settings, options.max_lora_rank)
        refuse_experts(experts_of(settings, model), where)
    except ConfigError as error:
        raise type(error)(error.message, where=where, fix=error.fix) from error


def _refuse_kind(config: Any) -> None:
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        raise UnsupportedError(
            f"a {kind} adapter: the engine serves LoRA adapters only, so it would not be sampled"
            " from",
            fix="use peft.LoraConfig, or load with fast_inference=False",
        )
    for name in other_fields(config.to_dict()):
        raise UnsupportedError(
            f"{name}={getattr(config, name, None)!r}: the engine's LoRA slots cannot hold it",
            fix="leave it out, or load with fast_inference=False",
        )


def other_fields(values: Mapping[str, Any]) -> list[str]:
    """Fields of an adapter's config that are set and that ``LoraSettings`` does not express."""
    default, known = LoraConfig(), {item.name for item in fields(LoraSettings)}
    return [
        name
        for name, value in values.items()
        if name not in known | set(BOOKKEEPING) and value and value != getattr(default, name, None)
    ]


def read_peft_config(values: Mapping[str, Any]) -> Any:
    """The ``peft.LoraConfig`` of an adapter_config.json's object, trainable.

    Raises:
        ConfigValueError: it is no LoRA adapter, or its values are none that PEFT takes.
    """
    kind = values.get("peft_type")
    if kind != "LORA":
        raise ConfigValueError(f"peft_type is {kind!r}, and only LORA adapters are loaded")
    ours = {item.name for item in fields(LoraSettings)} - set(NOT_PEFTS)
    for name in other_fields(values):
        raise ConfigValueError(f"its {ADAPTER_CONFIG} sets {name}, which is not supported")
    kept = {name: values[name] for name in (*ours, *KEPT) if name in values}
    try:
        return LoraConfig(**{**kept, "inference_mode": False, "task_type": "CAUSAL_LM"})
    except (TypeError, ValueError) as error:
        raise ConfigValueError(f"its {ADAPTER_CONFIG} cannot be used: {error}") from error


def settings_of(config: Any) -> LoraSettings:
    """The settings that a ``peft.LoraConfig`` expresses, for the refusals of
    ``policy.settings``.
    """
    values = {item.name: getattr(config, item.name, None) for item in fields(LoraSettings)}
    kept = {name: value for name, value in values.items() if value is not None}
    for name, value in kept.items():
        if isinstance(value, (set, list)):
            kept[name] = tuple(sorted(value))
    return LoraSettings(**kept)


def add_from_config(model: Any, config: Any, name: str = "default") -> Any:
    """``model`` with an adapter ``name`` laid out by ``config``, its values still to be set."""
    use_fast_layers(config)
    try:
        if is_peft(model):
            model.add_adapter(name, config)
            return model
        with torch.random.fork_rng(devices=[]):
            return PeftModelForCausalLM(model, config, adapter_name=name)
    except ValueError as error:
        raise ConfigValueError(
            f"target_modules={config.target_modules!r}: no adapter can be put on that"
            f" ({first_line(error, longest=80)})",
            where=WHERE,
        ) from error


@contextmanager
def kept_float32(model: Any) -> Iterator[None]:
    """Inside, others may round the adapter on ``model``; afterwards its values are what they were.

    TRL 1.16 casts the adapter of a model that is loaded in 4 or 8 bits to bfloat16
    (GRPOTrainer.__init__), as the QLoRA paper does. GRPO's updates are smaller than that rounding.
    """
    named = getattr(model, "named_parameters", dict)
    named = dict(named()) if is_peft(model) else {}
    before = {id(p): p.data for name, p in named.items() if "lora_" in name}
    try:
        yield
    finally:
        for parameter in named.values():
            kept = before.get(id(parameter))
            if kept is not None and parameter.dtype != kept.dtype:
                parameter.data = kept.to(parameter.device)


def widen_adapter(model: Any) -> None:
    """Hold every trained LoRA tensor on ``model`` in float32, whoever made it."""
    for name, parameter in model.named_parameters():
        half = parameter.dtype in (torch.bfloat16, torch.float16)
        if "lora_" in name and parameter.requires_grad and half:
            parameter.data = parameter.data.float()
