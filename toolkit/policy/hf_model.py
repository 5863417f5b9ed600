"""Load a Hugging Face causal language model from a checkpoint, with the requested dtype, device,
quantization and number of positions.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from toolkit.base.errors import (
    ConfigValueError,
    InputError,
    MissingExtraError,
    ToolkitError,
    UnsupportedError,
    first_line,
)
from toolkit.base.mapped_files import copy_mapped_weights
from toolkit.base.process_environment import local_rank
from toolkit.config.libraries import ModelType, model_type
from toolkit.config.resolved import resolve_dtype
from toolkit.config.supported_features import architecture_problem, storage_problem
from toolkit.policy.attention import choose_attention
from toolkit.policy.fingerprint import store_base_digests
from toolkit.policy.load_arguments import WHERE
from toolkit.policy.machine_facts import detect_machine
from toolkit.policy.max_positions import set_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from toolkit.policy.load_request import LoadRequest
    from toolkit.policy.model_files import Checkpoint


def check_quantization(request: LoadRequest) -> None:
    """Raise an error if 4-bit or 8-bit loading is requested but not possible.

    Raises:
        UnsupportedError: there is no CUDA GPU.
        MissingExtraError: bitsandbytes is not installed.
    """
    flag = "load_in_4bit" if request.load_in_4bit else "load_in_8bit"
    if not (request.load_in_4bit or request.load_in_8bit):
        return
    if not torch.cuda.is_available():
        raise UnsupportedError(
            f"{flag}=True needs an NVIDIA GPU, but PyTorch finds none"
            + (" (the default of load_in_4bit is True)" if request.load_in_4bit else ""),
            where=WHERE,
            fix=f"pass {flag}=False",
        )
    if find_spec("bitsandbytes") is None:
        raise MissingExtraError(
            f"{flag}=True needs bitsandbytes, which is not installed",
            where=WHERE,
            fix="run `pip install 'grpo-toolkit[cuda]'`, or pass " + flag + "=False",
        )


def choose_dtype(request: LoadRequest) -> torch.dtype:
    """Return the dtype of the weights. ``config.resolved.resolve_dtype`` replaces "auto"."""
    name = resolve_dtype(request.dtype, detect_machine(), load_in_16bit=request.load_in_16bit)
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def read_config(checkpoint: Checkpoint, request: LoadRequest) -> Any:
    """Read the model's configuration, and set its number of positions (its maximum sequence length)
    as ``request`` needs it.

    Raises:
        InputError: config.json cannot be read.
        UnsupportedError: the model is not a text-only causal language model.
    """
    _refuse_unsupported_model(checkpoint, request)
    try:
        config = AutoConfig.from_pretrained(
            str(checkpoint.folder),
            trust_remote_code=request.trust_remote_code,
            local_files_only=True,
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"the model's config.json cannot be used: {first_line(error)}",
            where=checkpoint.name,
            fix="check the checkpoint. If the model has its own code, pass trust_remote_code=True",
        ) from error
    if config.get_text_config() is not config:
        raise UnsupportedError(
            f"{config.model_type!r} is a multimodal model, but only text models are supported",
            where=checkpoint.name,
            fix="use the text-only checkpoint of the model family",
        )
    set_positions(config, request, checkpoint.name)
    return config


def _refuse_unsupported_model(checkpoint: Checkpoint, request: LoadRequest) -> None:
    """Raise an error if config.json has an architecture or a storage format that is not supported
    (``config.supported_features``). If the file is not JSON, ``read_config`` reports it later.
    """
    try:
        values = checkpoint.read_json("config.json")
    except InputError:
        return
    family = values.get("model_type")
    family_facts = model_type(family) if isinstance(family, str) else ModelType()
    problem = architecture_problem(
        values,
        trust_remote_code=request.trust_remote_code,
        known=family_facts.is_known,
        causal=family_facts.is_causal,
    ) or storage_problem(
        values,
        load_in_4bit=request.load_in_4bit,
        load_in_8bit=request.load_in_8bit,
        engine=request.fast_inference,
    )
    if problem is not None:
        error_class = ConfigValueError if problem.fixes else UnsupportedError
        raise error_class(problem.message, where=checkpoint.name, fix=problem.advice)


def load_base(checkpoint: Checkpoint, request: LoadRequest) -> Any:
    """Load the base model from the checkpoint. The weights are frozen, unless ``full_finetuning``
    is set.

    Raises:
        InputError: a weight file cannot be read, or tensors are missing, unexpected or have a wrong
            shape.
    """
    checkpoint.check_model(pickle=not request.use_safetensors)
    config = read_config(checkpoint, request)
    attention = choose_attention(
        config, request.attn_implementation, WHERE, trusted=request.trust_remote_code
    )
    quantization = _quantization_config(config, request)
    device_map = _resolve_device_map(request.device_map)
    try:
        model, loading_info = AutoModelForCausalLM.from_pretrained(
            str(checkpoint.folder),
            config=config,
            dtype=choose_dtype(request),
            device_map=device_map,
            quantization_config=quantization,
            attn_implementation=attention,
            use_safetensors=request.use_safetensors,
            trust_remote_code=request.trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
        )
    except (torch.OutOfMemoryError, MemoryError, ToolkitError):
        raise
    except Exception as error:  # values in the model's files can cause any error in transformers
        reason = first_line(error)
        if "ignore_mismatched_sizes" in reason:
            reason = "the shapes of its weights differ from those that config.json describes"
        elif not isinstance(error, (OSError, ValueError, RuntimeError)):
            reason = f"{type(error).__name__}: {reason}"
        raise InputError(
            f"the model cannot be loaded: {reason}",
            where=checkpoint.name,
            fix="check config.json, generation_config.json and the weights in the model's folder, "
            "or copy them again",
        ) from error
    _check_complete(loading_info, checkpoint.name)
    copy_mapped_weights(model)
    if request.resize_model_vocab is not None:
        _resize_vocabulary(model, request.resize_model_vocab, request.random_state)
    else:
        store_base_digests(model, checkpoint.folder)
    model.requires_grad_(request.full_finetuning)
    return model


def _quantization_config(config: Any, request: LoadRequest) -> Any:
    """Return bitsandbytes' settings for the request, or None if the request has no quantization.
    4-bit weights are in the format NF4. Their scales are in float32 and are not quantized
    themselves, as in the engine.
    """
    if getattr(config, "quantization_config", None) is not None:
        return None  # the checkpoint is already quantized, and transformers reads its settings
    if request.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    if not request.load_in_4bit:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=False,
        bnb_4bit_compute_dtype=choose_dtype(request),
    )


def _resolve_device_map(requested: Any) -> Any:
    """Return transformers' device map for the argument ``device_map``. ``"sequential"`` (the
    default) puts the whole model on this process's device.
    """
    has_cuda = torch.cuda.is_available()
    if requested in (None, "sequential", "auto", "balanced") and not has_cuda:
        return None
    if requested in (None, "sequential"):
        is_launched = "LOCAL_RANK" in os.environ
        rank = local_rank() if is_launched else torch.cuda.current_device()
        return {"": rank % torch.cuda.device_count()}
    devices = set(requested.values()) if isinstance(requested, dict) else {requested}
    needs_cuda = any(
        str(device).startswith("cuda") or isinstance(device, int) for device in devices
    )
    if needs_cuda and not has_cuda:
        raise ConfigValueError(
            f"device_map={requested!r} names a GPU, but PyTorch finds none",
            where=WHERE,
            fix="remove device_map",
        )
    return requested


def _check_complete(loading_info: dict[str, Any], name: str) -> None:
    """Raise an error if the checkpoint lacks a tensor of the model, or has a tensor that the model
    does not have.
    """
    for key, message in (
        ("missing_keys", "the checkpoint does not contain {} tensors of the model"),
        ("unexpected_keys", "the checkpoint contains {} tensors that the model does not have"),
    ):
        names = sorted(loading_info.get(key) or ())
        if names:
            remainder = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise InputError(
                f"{message.format(len(names))}: {', '.join(names[:3])}{remainder}",
                where=name,
                fix="copy the checkpoint again, because it does not match its own config.json",
            )


def _resize_vocabulary(model: PreTrainedModel, size: int, seed: int) -> None:
    """Resize embeddings and head to ``size`` rows. The values of new rows depend only on
    ``seed``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model.resize_token_embeddings(size)
