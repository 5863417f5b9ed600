"""Check that a model fits its trainer: the same GPU, the same dtype, and an adapter that the engine
supports.

``fit_config_to_model`` runs before TRL builds its trainer, and ``set_up_adapter`` runs afterwards.
Both functions accept any model, also one that ``FastLanguageModel`` did not load.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from toolkit.base.errors import ConfigError, ConfigValueError
from toolkit.policy.base_checksum import CHECKSUMS_ATTRIBUTE
from toolkit.policy.lora import cast_adapter_to_float32, refuse_unsupported_adapter
from toolkit.policy.model_attributes import add_toolkit_attributes
from toolkit.policy.model_loading import publish_to_engine
from toolkit.train.base_check import BaseCheck, refuse_untrainable
from toolkit.train.grpo_config import follow_dtype, use_one_gpu

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from toolkit.train.trainer_seam import TrainerSeam


WHERE = "GRPOTrainer"


def fit_config_to_model(model: PreTrainedModel, engine: Any, config: Any, peft_config: Any) -> None:
    """Reject a model that the engine cannot sample from, and set the fields of ``config`` that
    depend on the model.

    Raises:
        ConfigError: an option does not fit the model. The message contains the option's name.
    """
    use_one_gpu(config)
    if getattr(model, "toolkit_checkpointing", None) is False:
        config.gradient_checkpointing = False
    if engine is not None:
        _refuse_other_engines(config)
        for name, adapter_config in getattr(model, "peft_config", {}).items():
            refuse_unsupported_adapter(
                model, adapter_config, engine, f"adapter {name!r} of the model"
            )
        if peft_config is not None:
            refuse_unsupported_adapter(model, peft_config, engine, "peft_config")
        _refuse_other_device(model, config)
        if getattr(model, CHECKSUMS_ATTRIBUTE, None) is not None:
            BaseCheck(model).refuse_changed()
    if engine is not None or getattr(model, "toolkit_full_finetuning", None) is False:
        engine_dtype = getattr(engine, "dtype", None)
        follow_dtype(config, engine_dtype or _dtype_of(model), engine=engine_dtype is not None)


def _refuse_other_engines(config: Any) -> None:
    """Raise ConfigValueError if ``config`` requests that a vLLM server or transformers generates
    the completions, because the engine of the model generates them.
    """
    conflicts = {
        "vllm_mode": ("server", "no vLLM server is used"),
        "use_transformers_continuous_batching": (True, "Hugging Face generation is not used"),
    }
    for name, (value, unused_backend) in conflicts.items():
        if getattr(config, name, None) == value:
            raise ConfigValueError(
                f"{name}={value!r} cannot be used, because the model has its own engine: "
                f"{unused_backend}",
                where=f"GRPOConfig.{name}",
                fix=f"remove {name}, or load the model with fast_inference=False",
            )


def set_up_adapter(
    trainer: TrainerSeam, model: PreTrainedModel, engine: Any, *, is_new_adapter: bool
) -> None:
    """Convert the adapter to float32, after TRL has built its trainer. ``is_new_adapter`` is True
    if TRL has just added the adapter to ``model``. In this case, also register the adapter with the
    engine.

    Raises:
        ConfigError: no parameter is trainable, or a weight that is shared with the engine is
            trainable.
    """
    if not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        cast_adapter_to_float32(trainer.model)
    refuse_untrainable(trainer.model, engine)
    if is_new_adapter and hasattr(model, "toolkit_tokenizer"):
        publish_to_engine(add_toolkit_attributes(trainer.model, copy_from=model))


def _dtype_of(model: PreTrainedModel) -> torch.dtype:
    """Return the dtype of the base model's weights. If the base model is quantized, this is the
    dtype of its weights that are not quantized.
    """
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    base_dtype: torch.dtype = dtypes[0] if dtypes else model.dtype
    return base_dtype


def _refuse_other_device(model: PreTrainedModel, config: Any) -> None:
    """Raise ConfigError if the trainer would use another device than the model. transformers would
    then move the model to the trainer's device, as a second copy of the weights.
    """
    model_device, trainer_device = next(model.parameters()).device, torch.device(config.device)
    if model_device.type != trainer_device.type or (model_device.index or 0) != (
        trainer_device.index or 0
    ):
        raise ConfigError(
            f"the model and its engine are on {model_device}, but the trainer would train on "
            f"{trainer_device}",
            where=WHERE,
            fix="make one GPU visible with CUDA_VISIBLE_DEVICES"
            if model_device.type == trainer_device.type
            else f"set use_cpu={model_device.type == 'cpu'} in GRPOConfig",
        )
