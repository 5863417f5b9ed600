"""Define ``FastLanguageModel``, with which a script loads a model, adds an adapter, and switches
between training and inference.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.base.errors import ConfigTypeError, ConfigValueError, ToolkitWarning
from toolkit.policy.from_config import make_load_request
from toolkit.policy.gradient_checkpointing import (
    apply_checkpointing,
    pause_checkpointing,
    resume_checkpointing,
)
from toolkit.policy.load_arguments import WHERE as LOAD_WHERE
from toolkit.policy.load_arguments import check_checkpointing, refuse_unknown
from toolkit.policy.load_request import apply_standby_variable, check_request
from toolkit.policy.lora import add_lora, is_peft, reuse_adapter
from toolkit.policy.lora_settings import (
    WHERE,
    LoraSettings,
    default_targets_of,
    default_targets_with_warning,
)
from toolkit.policy.model_attributes import add_toolkit_attributes
from toolkit.policy.model_loading import load_model_and_tokenizer, publish_to_engine, read_tokenizer
from toolkit.policy.saved_adapter import check_start_settings, read_adapter

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from toolkit.config.run_config import RunConfig

DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA_KWARGS = (
    "use_dora",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "exclude_modules",
    "target_parameters",
    "trainable_token_indices",
)
"""The keyword arguments that get_peft_model accepts although they are not in its signature. They
are fields of PEFT's LoraConfig.
"""


class FastLanguageModel:
    """The class with which a script loads a model, adds an adapter, and switches between training
    and inference. Every method is static, because the state is stored in the model.
    """

    @staticmethod
    def from_pretrained(  # noqa: PLR0913 - the drop-in signature
        model_name: str,
        max_seq_length: int | None = 2048,
        dtype: Any = None,
        load_in_4bit: bool = True,
        load_in_8bit: bool = False,
        load_in_16bit: bool = False,
        full_finetuning: bool = False,
        token: str | bool | None = None,
        device_map: Any = "sequential",
        rope_scaling: Mapping[str, Any] | None = None,
        fix_tokenizer: bool = True,
        trust_remote_code: bool = False,
        use_gradient_checkpointing: bool | str = "unsloth",
        resize_model_vocab: int | None = None,
        revision: str | None = None,
        use_exact_model_name: bool = False,
        offload_embedding: bool = False,
        float32_mixed_precision: bool | None = None,
        fast_inference: bool = False,
        gpu_memory_utilization: float | str = 0.5,
        float8_kv_cache: bool = False,
        random_state: int = 3407,
        max_lora_rank: int | str = 64,
        disable_log_stats: bool = True,
        qat_scheme: str | None = None,
        load_in_fp8: bool | str = False,
        text_only: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Load ``model_name`` and its tokenizer.

        ``model_name`` is a folder, a hub id, or the folder of an adapter. For the folder of an
        adapter, the adapter's base model is loaded with the adapter, which can be trained further.
        If ``dtype`` is None, the dtype is bfloat16 on a GPU (float16 on a GPU without bfloat16) and
        float32 on a CPU. ``max_seq_length`` is in tokens.

        If ``fast_inference`` is True, a vLLM engine loads the weights, and the model's parameters
        are views of the engine's weights. Then ``gpu_memory_utilization`` is the engine's share of
        the GPU's memory, and ``max_lora_rank`` is the largest adapter rank that the engine
        supports. If one of these is "auto", the toolkit's memory estimate chooses its value, as for
        a run file with the same keys. The estimate assumes the adapter that is loaded. If no
        adapter is loaded, it assumes an adapter of rank 16. ``kwargs`` are ``attn_implementation``
        and engine options such as ``max_num_seqs``.

        Returns:
            (model, tokenizer). The model also has ``fast_generate``, ``save_lora``, ``load_lora``,
            ``max_seq_length``, and ``vllm_engine`` (None without an engine).

        Raises:
            ConfigTypeError, ConfigValueError, UnsupportedError, MissingExtraError: a parameter is
                rejected. The message names the parameter.
            InputError: the checkpoint cannot be found or read.
        """
        arguments = {name: value for name, value in locals().items() if name != "kwargs"}
        arguments["model_name"] = _checked_model_name(model_name)
        return load_model_and_tokenizer(
            check_request(apply_standby_variable({**arguments, **kwargs}, os.environ))
        )

    @staticmethod
    def get_peft_model(  # noqa: PLR0913 - the drop-in signature
        model: PreTrainedModel,
        r: int = 16,
        target_modules: Sequence[str] | str = DEFAULT_TARGETS,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        layers_to_transform: Sequence[int] | int | None = None,
        layers_pattern: Sequence[str] | str | None = None,
        use_gradient_checkpointing: bool | str = "unsloth",
        random_state: int = 3407,
        max_seq_length: int = 2048,
        use_rslora: bool = False,
        modules_to_save: Sequence[str] | None = None,
        init_lora_weights: bool | str = True,
        loftq_config: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Add a LoRA adapter to ``model`` and return it as a ``peft.PeftModelForCausalLM``.

        The update of a weight is s B A, with s = alpha/r (arXiv 2106.09685), or alpha/sqrt(r) with
        ``use_rslora`` (arXiv 2312.03732). B is 0 at first, so the adapter does not change the
        logits. The same ``random_state`` gives the same adapter weights. By default the projections
        of attention and MLP are adapted in a dense model, and only the projections of attention in
        a mixture of experts. If the model already has an adapter with these settings, the model is
        returned unchanged with a warning.

        Raises:
            ConfigTypeError: r is not an int, a keyword is unknown, or the model already has an
                adapter with other settings.
            ConfigValueError: a value is invalid, a target does not exist in the model, or r is
                above the engine's ``max_lora_rank``.
            UnsupportedError: the model's engine cannot sample from such an adapter.
        """
        refuse_unknown(kwargs, LORA_KWARGS, WHERE)
        check_checkpointing(use_gradient_checkpointing, WHERE)
        settings = LoraSettings(
            r=r,
            target_modules=default_targets_with_warning(model)
            if target_modules is DEFAULT_TARGETS
            else _as_tuple(target_modules),
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            bias=bias,
            layers_to_transform=_as_tuple(layers_to_transform),
            layers_pattern=_as_tuple(layers_pattern),
            random_state=random_state,
            use_rslora=use_rslora,
            modules_to_save=_as_tuple(modules_to_save),
            init_lora_weights=init_lora_weights,
            loftq_config=loftq_config,
            **{name: _as_tuple(value) for name, value in kwargs.items() if value is not None},
        )
        _check_max_seq_length(model, max_seq_length)
        if is_peft(model):
            return reuse_adapter(model, settings)
        if getattr(model, "toolkit_full_finetuning", False):
            warnings.warn(
                "no adapter was added, because the model was loaded with full_finetuning=True and "
                "all its weights are trained",
                ToolkitWarning,
                stacklevel=2,
            )
            return model
        return add_new_adapter(model, settings, use_gradient_checkpointing)

    @staticmethod
    def for_training(model: PreTrainedModel, use_gradient_checkpointing: bool | None = None) -> Any:
        """Set ``model`` to training mode and return it. Gradient checkpointing is switched back to
        the mode that was set for this model (``apply_checkpointing``). If
        ``use_gradient_checkpointing`` is False, checkpointing is switched off.
        """
        model.train()
        if use_gradient_checkpointing is False:
            pause_checkpointing(model)
        else:
            resume_checkpointing(model)
        return model

    @staticmethod
    def for_inference(model: PreTrainedModel) -> Any:
        """Set ``model`` to evaluation mode and return it. Gradient checkpointing is switched off,
        because it would disable the KV cache.
        """
        model.eval()
        pause_checkpointing(model)
        return model


def add_new_adapter(
    model: PreTrainedModel, settings: LoraSettings, checkpointing: bool | str
) -> Any:
    """Add a new adapter and the toolkit's methods to ``model``, set the model to training mode, and
    return the PEFT model.
    """
    peft_model = publish_to_engine(add_lora(model, settings))
    length = getattr(model, "max_seq_length", None)
    apply_checkpointing(peft_model, checkpointing, max_seq_length=length)
    add_toolkit_attributes(peft_model, copy_from=model)
    peft_model.train()
    return peft_model


def load_policy(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[Any, Any]:
    """Load the model, its adapter and the tokenizer for a resolved run file. Returns (model,
    tokenizer).

    ``runtime.engine`` of the run file selects the engine. If ``load_policy_tokenizer`` was called
    before, pass its result as ``tokenizer``. Raises the errors of
    ``FastLanguageModel.from_pretrained`` and ``get_peft_model``.
    """
    if config.lora.adapter_path is not None and not config.model.full_finetuning:
        return load_with_start_adapter(config, tokenizer)
    model, tokenizer = load_model_and_tokenizer(make_load_request(config), tokenizer=tokenizer)
    if is_peft(model) or config.model.full_finetuning:
        return model, tokenizer
    section = config.lora
    if section.target_modules == "auto":
        section = replace(section, target_modules=default_targets_of(model))
    settings = LoraSettings.from_section(section)
    return add_new_adapter(model, settings, config.lora.use_gradient_checkpointing), tokenizer


def load_with_start_adapter(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[Any, Any]:
    """Load the model with the adapter in ``lora.adapter_path``, so that this adapter can be trained
    further. If the model has an engine, the adapter is copied to the engine. Returns (model,
    tokenizer).

    Raises:
        ConfigTypeError: the ``lora`` section has other settings than the adapter.
        ConfigValueError: the adapter belongs to another base model.
    """
    folder = Path(str(config.lora.adapter_path))
    settings = LoraSettings.from_section(config.lora)
    if config.lora.target_modules == "auto":
        raise ConfigValueError(
            "target_modules is still auto, but with adapter_path it must be the adapter's value",
            where="lora.target_modules",
            fix="read the run file with toolkit.config.load_run, which sets target_modules to the "
            "adapter's value",
        )
    check_start_settings(read_adapter(folder), settings)
    return load_model_and_tokenizer(make_load_request(config), folder, tokenizer)


def load_policy_tokenizer(config: RunConfig) -> Any:
    """Load the tokenizer that ``load_policy`` returns, without loading the model and its engine.
    Raises InputError if the tokenizer cannot be read.
    """
    return read_tokenizer(make_load_request(config))


def _check_max_seq_length(model: PreTrainedModel, max_seq_length: int) -> None:
    """Raise an error if ``max_seq_length`` is neither the length that the model was loaded with nor
    the default value. The length cannot change after the model is loaded.
    """
    loaded_length = getattr(model, "max_seq_length", None)
    if max_seq_length not in (loaded_length, 2048) and loaded_length is not None:
        raise ConfigValueError(
            f"max_seq_length={max_seq_length}, but the model was loaded with "
            f"max_seq_length={loaded_length}",
            where=WHERE,
            fix=f"pass max_seq_length={max_seq_length} to from_pretrained",
        )


def _checked_model_name(name: Any) -> str:
    if not isinstance(name, (str, PathLike)):
        raise ConfigTypeError(f"model_name={name!r} must be a string or a path", where=LOAD_WHERE)
    return str(name)


def _as_tuple(value: object) -> Any:
    return tuple(value) if isinstance(value, (list, tuple, set)) else value
