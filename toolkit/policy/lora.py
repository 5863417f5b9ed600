"""Create, read and change the adapter that is trained, with PEFT.

Adapter weights are float32 for every dtype of the base model (PEFT's default). A bfloat16 adapter
has only 8 bits of mantissa. An Adam step below 1/256 of the weight would then be lost, and Adam's
moments would be bfloat16 too. The forward pass computes in the base model's dtype under autocast,
as the engine does.
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
from toolkit.config.adapter_facts import KEPT, unsupported_fields
from toolkit.engine.shards import gather_full_tensor, local_shard
from toolkit.policy.lora_layer import use_fast_layers
from toolkit.policy.lora_settings import (
    WHERE,
    LoraSettings,
    check_engine_support,
    check_layer_numbers,
    check_modules_to_save,
    check_settings,
    check_targets,
    refuse_experts,
    targeted_experts,
)
from toolkit.policy.model_files import ADAPTER_CONFIG

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from transformers import PreTrainedModel

NON_PEFT_FIELDS = ("random_state",)
REFERENCE_ADAPTER = "ref"
"""TRL's name for the frozen copy of the adapter that a run starts from."""

MAPPING_FIELDS = ("loftq_config", "rank_pattern", "alpha_pattern")
COMPARED_FIELDS = (
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
"""The fields that define an adapter, in the order in which differences are reported."""


def add_lora(model: PreTrainedModel, settings: LoraSettings) -> Any:
    """Add a new adapter to ``model`` (a transformers model). Returns a
    ``peft.PeftModelForCausalLM``.

    B is 0, so the adapter does not change the logits. A is drawn on the CPU with the seed
    ``settings.random_state``, so the same seed gives the same values on every device. The caller's
    random generators are restored.

    Raises:
        ConfigTypeError, ConfigValueError, UnsupportedError: a check of ``policy.lora_settings``
            rejects the settings.
    """
    check_settings(settings)
    engine = getattr(model, "toolkit_engine", None)
    experts = targeted_experts(settings, model)
    config = to_peft_config(settings)
    if engine is not None:
        refuse_unsupported_adapter(model, config, engine, WHERE)
    check_targets(settings, (*(name for name, _ in model.named_modules()), *experts))
    check_modules_to_save(settings, (name for name, _ in model.named_modules()))
    check_layer_numbers(
        settings, getattr(model.config.get_text_config(), "num_hidden_layers", None)
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.random_state)
        try:
            return get_peft_model(model, use_fast_layers(config))
        except ValueError as error:
            raise ConfigValueError(str(error).strip(), where=WHERE) from error


def to_peft_config(settings: LoraSettings) -> Any:
    """Return the ``peft.LoraConfig`` for ``settings``."""
    values: dict[str, Any] = {}
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.name in NON_PEFT_FIELDS or (field.name in MAPPING_FIELDS and not value):
            continue
        values[field.name] = _to_list_or_dict(value)
    try:
        return LoraConfig(task_type="CAUSAL_LM", **values)
    except (ValueError, ImportError) as error:
        raise ConfigValueError(str(error).strip(), where=WHERE) from error


def _to_list_or_dict(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if hasattr(value, "items") else value


def is_peft(model: PreTrainedModel) -> bool:
    """Return True if ``model`` is a PEFT model (a model with an adapter)."""
    return isinstance(model, PeftModel)


def reuse_adapter(model: PreTrainedModel, settings: LoraSettings) -> Any:
    """Return ``model`` unchanged, with a warning, if its adapter already has these ``settings``.

    Raises:
        ConfigTypeError: the settings differ from the adapter's. The message lists the differences.
    """
    check_settings(settings)
    differing = describe_differences(model.peft_config["default"], settings)
    if differing:
        raise ConfigTypeError(
            "the model already has an adapter with other settings: " + "; ".join(differing),
            where=WHERE,
            fix="load the model again, or pass the settings of the existing adapter",
        )
    warnings.warn(
        ("the model already has this adapter, so it is returned unchanged"),
        ToolkitWarning,
        stacklevel=4,
    )
    return model


def describe_differences(
    current: Any, settings: LoraSettings, names: Iterable[str] = COMPARED_FIELDS
) -> list[str]:
    """Compare the adapter config ``current`` (a ``peft.LoraConfig``) with ``settings``. Only the
    fields in ``names`` are compared. Returns one line of text for each field whose values differ.
    """
    requested = to_peft_config(settings)
    pairs = [
        (name, _comparable_value(current, name), _comparable_value(requested, name))
        for name in names
    ]
    return [
        f"{name} is {existing!r} in the adapter, but {wanted!r} is requested"
        for name, existing, wanted in pairs
        if existing != wanted
    ]


def _comparable_value(config: Any, name: str) -> Any:
    """Return a field's value in a form that can be compared. Collections of names are sorted. Empty
    collections become None.
    """
    value = getattr(config, name)
    if isinstance(value, (set, list, tuple)):
        return sorted(value) or None
    return value or None if isinstance(value, dict) else value


def adapter_tensors(model: PreTrainedModel, name: str = "default") -> dict[str, torch.Tensor]:
    """Return the adapter's tensors, by their names in the adapter's file.

    The tensors are those of the model, not copies. If several processes share a model, each of them
    has only a part of the adapter. Then the result has new tensors, which are joined from the parts
    of all these processes, and all of them must call this function.
    """
    tensors: dict[str, torch.Tensor] = get_peft_model_state_dict(
        model, adapter_name=name, save_embedding_layers=False
    )
    parameters = _adapter_parameters(model, name)
    return {key: gather_full_tensor(tensor, parameters.get(key)) for key, tensor in tensors.items()}


def _adapter_parameters(model: PreTrainedModel, name: str) -> dict[str, torch.Tensor]:
    """Return the parameters of an adapter under the names that they have in the adapter's file."""
    named_parameters = (
        (key.replace(f".{name}.", "."), value) for key, value in model.named_parameters()
    )
    return {key: value for key, value in named_parameters if "lora_" in key}


def set_adapter_tensors(
    model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], name: str = "default"
) -> None:
    """Copy ``tensors`` into the adapter ``name``. The caller must have checked that ``tensors`` has
    the names and shapes that ``adapter_tensors`` returns.
    """
    parameters = _adapter_parameters(model, name)
    local_tensors = {
        k: local_shard(v, parameters[k]) if k in parameters else v for k, v in tensors.items()
    }
    set_peft_model_state_dict(model, local_tensors, adapter_name=name)


@torch.no_grad()
def merge_into_base(model: PreTrainedModel, name: str = "default") -> Any:
    """Merge the adapter ``name`` into the base model's weights. Returns the base model.

    The merged weight W + s B A is computed in float32 and rounded once. PEFT's own merge rounds the
    update before the addition. So PEFT's merge is used only for an adapter that does more than add
    s B A to a weight (such as DoRA).
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not all(_is_plain_lora(layer, name) for layer in layers):
        return model.merge_and_unload(safe_merge=True, adapter_names=[name])
    for layer in layers:
        if name in layer.lora_A:
            weight = layer.get_base_layer().weight
            weight.copy_(weight.float() + layer.get_delta_weight(name).float())
    return model.unload()


def _is_plain_lora(layer: Any, name: str) -> bool:
    """Return True if adapter ``name`` only adds s B A to the weight of ``layer``. B and A are the
    LoRA matrices, and s is the scale.
    """
    if name in layer.lora_embedding_A or hasattr(layer, "parameter_name"):
        return False
    if name not in layer.lora_A:
        return True
    return layer.lora_variant.get(name) is None and layer.lora_B[name].bias is None


def refuse_unsupported_adapter(
    model: PreTrainedModel, config: Any, engine: Any, where: str
) -> None:
    """Raise an error if the engine of ``model`` cannot sample from an adapter with ``config``, or
    if such an adapter would change the shared weights. ``config`` is any ``peft.PeftConfig``.

    An engine without LoRA slots samples from the trained model itself, so it supports every
    adapter.

    Raises:
        UnsupportedError, ConfigValueError, ConfigTypeError: an option is not supported. The message
            names the option.
    """
    options = getattr(engine, "options", None)
    if options is None:
        return
    try:
        _refuse_adapter_type(config)
        settings = settings_from_peft(config)
        check_settings(settings)
        check_engine_support(settings, options.max_lora_rank)
        refuse_experts(targeted_experts(settings, model), where)
    except ConfigError as error:
        raise type(error)(error.message, where=where, fix=error.fix) from error


def _refuse_adapter_type(config: Any) -> None:
    adapter_type = str(getattr(config.peft_type, "value", config.peft_type))
    if adapter_type != "LORA":
        raise UnsupportedError(
            f"the adapter is a {adapter_type} adapter, but the engine can sample only from LoRA "
            "adapters",
            fix="use peft.LoraConfig, or load the model with fast_inference=False",
        )
    for name in unsupported_fields(config.to_dict()):
        raise UnsupportedError(
            f"the engine's LoRA slots do not support {name}={getattr(config, name, None)!r}",
            fix=f"remove {name}, or load the model with fast_inference=False",
        )


def read_peft_config(values: Mapping[str, Any]) -> Any:
    """Return a trainable ``peft.LoraConfig`` with the values of an adapter_config.json.

    Raises:
        ConfigValueError: ``values`` do not describe a LoRA adapter, or PEFT rejects them.
    """
    adapter_type = values.get("peft_type")
    if adapter_type != "LORA":
        raise ConfigValueError(
            f"peft_type is {adapter_type!r}, but only LORA adapters are supported"
        )
    known_fields = {field.name for field in fields(LoraSettings)} - set(NON_PEFT_FIELDS)
    for name in unsupported_fields(values):
        raise ConfigValueError(f"{ADAPTER_CONFIG} sets {name}, which is not supported")
    supported_values = {name: values[name] for name in (*known_fields, *KEPT) if name in values}
    try:
        return LoraConfig(**{**supported_values, "inference_mode": False, "task_type": "CAUSAL_LM"})
    except (TypeError, ValueError) as error:
        raise ConfigValueError(f"{ADAPTER_CONFIG} cannot be used: {error}") from error


def settings_from_peft(config: Any) -> LoraSettings:
    """Convert a ``peft.LoraConfig`` to ``LoraSettings``, so that the checks of
    ``policy.lora_settings`` can be used.
    """
    values = {field.name: getattr(config, field.name, None) for field in fields(LoraSettings)}
    present = {name: value for name, value in values.items() if value is not None}
    for name, value in present.items():
        if isinstance(value, (set, list)):
            present[name] = tuple(sorted(value))
    return LoraSettings(**present)


def add_adapter_from_config(model: PreTrainedModel, config: Any, name: str = "default") -> Any:
    """Add an adapter with the name ``name`` to ``model``. ``config`` is the ``peft.LoraConfig`` of
    the adapter. The caller sets the adapter's values later.

    Raises:
        ConfigValueError: the adapter does not match the model's layers.
    """
    use_fast_layers(config)
    try:
        if is_peft(model):
            model.add_adapter(name, config)
            return model
        with torch.random.fork_rng(devices=[]):
            return PeftModelForCausalLM(model, config, adapter_name=name)
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise ConfigValueError(
            f"the adapter's {ADAPTER_CONFIG} does not match this model:"
            f" {type(error).__name__}: {first_line(error)}",
            where=WHERE,
            fix="load the base model that the adapter was trained on, or copy the adapter again",
        ) from error
    except ValueError as error:
        raise ConfigValueError(
            f"target_modules={config.target_modules!r}: PEFT cannot adapt these modules "
            f"({first_line(error, longest=80)})",
            where=WHERE,
        ) from error


@contextmanager
def keep_adapter_float32(model: PreTrainedModel) -> Iterator[None]:
    """Keep the adapter of ``model`` in float32. If code in the ``with`` block converts the adapter
    to another dtype, the float32 values are restored after the block.

    If a model is loaded in 4 or 8 bits, TRL 1.16 casts the adapter to bfloat16
    (GRPOTrainer.__init__), as the QLoRA paper does. But GRPO's updates are smaller than the
    rounding error of bfloat16, so they would be lost.
    """
    named_parameters = getattr(model, "named_parameters", dict)
    named_parameters = dict(named_parameters()) if is_peft(model) else {}
    data_before = {id(p): p.data for name, p in named_parameters.items() if "lora_" in name}
    try:
        yield
    finally:
        for parameter in named_parameters.values():
            float32_data = data_before.get(id(parameter))
            if float32_data is not None and parameter.dtype != float32_data.dtype:
                parameter.data = float32_data.to(parameter.device)
        _copy_to_reference_adapter(model)


def _copy_to_reference_adapter(model: PreTrainedModel) -> None:
    """Restore the float32 values also in TRL's copy of the adapter.

    If beta is above 0, TRL 1.16 copies the adapter at the start of training, under the name
    ``ref``, to compute the KL term. This function sets the copy to the values of the adapter. Then
    the KL term is 0 before the first step.
    """
    named_parameters = dict(model.named_parameters()) if is_peft(model) else {}
    for name, parameter in named_parameters.items():
        trained = named_parameters.get(name.replace(f".{REFERENCE_ADAPTER}.", ".default."))
        if (
            f".{REFERENCE_ADAPTER}." in name
            and trained is not None
            and parameter.dtype != trained.dtype
        ):
            parameter.data = trained.data.clone()


def cast_adapter_to_float32(model: PreTrainedModel) -> None:
    """Convert every trainable LoRA tensor of ``model`` from half precision to float32."""
    for name, parameter in model.named_parameters():
        is_half_precision = parameter.dtype in (torch.bfloat16, torch.float16)
        if "lora_" in name and parameter.requires_grad and is_half_precision:
            parameter.data = parameter.data.float()
