"""Define FastLanguageModel: load a model, add an adapter, switch between training and inference."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.base.errors import ConfigTypeError, ConfigValueError, ToolkitWarning
from toolkit.policy.attach import attach
from toolkit.policy.from_config import request_of
from toolkit.policy.gradient_checkpointing import (
    apply_checkpointing,
    pause_checkpointing,
    resume_checkpointing,
)
from toolkit.policy.load_arguments import WHERE as LOAD_WHERE
from toolkit.policy.load_arguments import check_checkpointing, refuse_unknown
from toolkit.policy.load_request import check_request, with_standby
from toolkit.policy.lora import add_lora, is_peft, same_or_refuse
from toolkit.policy.lora_settings import WHERE, LoraSettings, default_for, told_default
from toolkit.policy.model_loading import load, read_tokenizer, tell_engine
from toolkit.policy.saved_adapter import read_adapter, same_start

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from toolkit.config.run_config import RunConfig

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA_KWARGS = (
    "use_dora",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "exclude_modules",
    "target_parameters",
    "trainable_token_indices",
)
"""Keyword arguments of get_peft_model that are not in its signature but are fields of PEFT's
LoraConfig.
"""


class FastLanguageModel:
    """The drop-in API. Every method is static, because the state is in the model."""

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

        ``model_name`` is a folder, a hub id, or the folder of an adapter. For an adapter, its base
        model is loaded with the adapter, which is trainable. ``dtype`` None means bfloat16 (or
        float16) on a GPU and float32 on a CPU. ``max_seq_length`` is in tokens. With
        ``fast_inference`` a vLLM engine has the weights and the model is a view of them. Then
        ``gpu_memory_utilization`` is the engine's share of the card and ``max_lora_rank`` its
        largest adapter rank; "auto" means the value that the sizer chooses for a run file with the
        same keys (with the adapter of the folder, else one of rank 16). ``kwargs`` are engine
        options such as ``max_num_seqs``, and ``attn_implementation``.

        Returns:
            (model, tokenizer). The model also has ``fast_generate``, ``save_lora``, ``load_lora``,
            ``vllm_engine`` (None without one) and ``max_seq_length``.

        Raises:
            ConfigTypeError, ConfigValueError, UnsupportedError, MissingExtraError: a parameter is
                refused; the message names it.
            InputError: the checkpoint cannot be found or read.
        """
        named = {name: value for name, value in locals().items() if name != "kwargs"}
        named["model_name"] = _path_text(model_name)
        return load(check_request(with_standby({**named, **kwargs}, os.environ)))

    @staticmethod
    def get_peft_model(  # noqa: PLR0913 - the drop-in signature
        model: Any,
        r: int = 16,
        target_modules: Sequence[str] | str = SEVEN,
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
        ``use_rslora`` (arXiv 2312.03732). B is 0 at first, so logits do not change; the same
        ``random_state`` gives the same bytes. If the model already has this adapter, there is only
        a warning. By default the projections of attention and MLP are adapted, or only those of
        attention in a mixture of experts.

        Raises:
            ConfigTypeError: r is not an int, a keyword is unknown, or the model has another
                adapter.
            ConfigValueError: a value is invalid, the model does not have a target, or r is above
                the engine's ``max_lora_rank``.
            UnsupportedError: the engine on the model cannot sample from such an adapter.
        """
        refuse_unknown(kwargs, LORA_KWARGS, WHERE)
        check_checkpointing(use_gradient_checkpointing, WHERE)
        settings = LoraSettings(
            r=r,
            target_modules=told_default(model)
            if target_modules is SEVEN
            else _frozen(target_modules),
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            bias=bias,
            layers_to_transform=_frozen(layers_to_transform),
            layers_pattern=_frozen(layers_pattern),
            random_state=random_state,
            use_rslora=use_rslora,
            modules_to_save=_frozen(modules_to_save),
            init_lora_weights=init_lora_weights,
            loftq_config=loftq_config,
            **{name: _frozen(value) for name, value in kwargs.items() if value is not None},
        )
        _check_length(model, max_seq_length)
        if is_peft(model):
            return same_or_refuse(model, settings)
        if getattr(model, "toolkit_full_finetuning", False):
            warnings.warn(
                "full_finetuning=True: every weight is trained, and no adapter was added",
                ToolkitWarning,
                stacklevel=2,
            )
            return model
        return put_adapter(model, settings, use_gradient_checkpointing)

    @staticmethod
    def for_training(model: Any, use_gradient_checkpointing: bool | None = None) -> Any:
        """Set ``model`` to training mode, with the gradient checkpointing that was chosen for it,
        and return it.

        With ``use_gradient_checkpointing`` False checkpointing stays off.
        """
        model.train()
        if use_gradient_checkpointing is False:
            pause_checkpointing(model)
        else:
            resume_checkpointing(model)
        return model

    @staticmethod
    def for_inference(model: Any) -> Any:
        """Set ``model`` to evaluation mode, without gradient checkpointing (which would disable the
        cache), and return it.
        """
        model.eval()
        pause_checkpointing(model)
        return model


def put_adapter(model: Any, settings: LoraSettings, checkpointing: bool | str) -> Any:
    """``model`` with a new adapter and the toolkit's methods, in training mode."""
    peft_model = tell_engine(add_lora(model, settings))
    length = getattr(model, "max_seq_length", None)
    apply_checkpointing(peft_model, checkpointing, max_seq_length=length)
    attach(peft_model, like=model)
    peft_model.train()
    return peft_model


def load_policy(config: RunConfig, tokenizer: Any = None) -> tuple[Any, Any]:
    """Load (model with its adapter, tokenizer) of a resolved run file; ``runtime.engine`` decides
    the engine. ``tokenizer`` is the result of ``policy_tokenizer``, if that was called before.

    Raises:
        As ``FastLanguageModel.from_pretrained`` and ``get_peft_model``.
    """
    if config.lora.adapter_path is not None and not config.model.full_finetuning:
        return load_start(config, tokenizer)
    model, tokenizer = load(request_of(config), tokenizer=tokenizer)
    if is_peft(model) or config.model.full_finetuning:
        return model, tokenizer
    section = config.lora
    if section.target_modules == "auto":
        section = replace(section, target_modules=default_for(model))
    settings = LoraSettings.from_section(section)
    return put_adapter(model, settings, config.lora.use_gradient_checkpointing), tokenizer


def load_start(config: RunConfig, tokenizer: Any = None) -> tuple[Any, Any]:
    """Load (model with the trainable adapter from ``lora.adapter_path``, tokenizer). If there is an
    engine, the adapter is published to it.

    Raises:
        ConfigTypeError: the ``lora`` section has other settings than the adapter.
        ConfigValueError: the adapter belongs to another base.
    """
    folder = Path(str(config.lora.adapter_path))
    asked = LoraSettings.from_section(config.lora)
    if config.lora.target_modules == "auto":
        raise ConfigValueError(
            "target_modules is still auto, but with adapter_path the adapter defines it",
            where="lora.target_modules",
            fix="read the run file with toolkit.config.load_run, which takes it from the adapter",
        )
    same_start(read_adapter(folder), asked)
    return load(request_of(config), folder, tokenizer)


def policy_tokenizer(config: RunConfig) -> Any:
    """Load the tokenizer that ``load_policy`` returns, without the model and its engine. Raises
    InputError.
    """
    return read_tokenizer(request_of(config))


def _check_length(model: Any, max_seq_length: int) -> None:
    """Raise an error for another ``max_seq_length`` than that of the loaded model or the default,
    because the length is fixed when the model is loaded.
    """
    loaded = getattr(model, "max_seq_length", None)
    if max_seq_length not in (loaded, 2048) and loaded is not None:
        raise ConfigValueError(
            f"max_seq_length={max_seq_length}, but the model was loaded with {loaded}",
            where=WHERE,
            fix=f"pass max_seq_length={max_seq_length} to from_pretrained",
        )


def _path_text(name: Any) -> str:
    if not isinstance(name, (str, PathLike)):
        raise ConfigTypeError(f"model_name={name!r} must be text or a path", where=LOAD_WHERE)
    return str(name)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple, set)) else value
