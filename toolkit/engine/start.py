"""From options to a running engine. Imports vLLM: reached through ``engine.load`` only, which
prepares the environment.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
import transformers
from vllm import LLM
from vllm.model_executor.models.registry import ModelRegistry

from toolkit.base.errors import InputError, ToolkitError, UnsupportedError
from toolkit.engine import loader, sleep
from toolkit.engine.live import Engine
from toolkit.engine.seams import device_type
from toolkit.engine.symptoms import explain

if TYPE_CHECKING:
    from toolkit.engine.options import EngineOptions


def start(options: EngineOptions) -> Engine:
    """Check what can be checked cheaply, then start vLLM and reach into it."""
    device = device_type()
    check_model(options, device)
    loader.register()
    sleep.register()
    arguments = options.to_vllm("cuda" if device == "cuda" else "cpu")
    if device == "cpu":
        arguments.setdefault("kv_cache_memory_bytes", CPU_KV_CACHE_BYTES)
        if os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
            del arguments["kv_cache_memory_bytes"]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        arguments.setdefault(
            "distributed_executor_backend", "external_launcher"
        )  # torchrun: one engine a rank
    owns_process_group = not torch.distributed.is_initialized()
    state = torch.get_rng_state()
    llm: LLM | None = None
    try:
        llm = LLM(**arguments)
        return Engine(llm, options, owns_process_group=owns_process_group)
    except ToolkitError:
        raise
    except Exception as problem:
        raise explain(problem, "the engine did not start") from problem
    finally:
        torch.set_rng_state(state)  # vLLM seeds torch's global generator


CPU_KV_CACHE_BYTES = 1 << 30
"""KV cache of a CPU engine when neither the options nor VLLM_CPU_KVCACHE_SPACE say otherwise."""


def check_model(options: EngineOptions, device: str) -> None:
    """Refuse, before minutes of loading, what would fail after it.

    Raises:
        InputError: no readable config.
        UnsupportedError: FP8, 4-bit without CUDA, an architecture that vLLM does not have.
    """
    config = read_config(options)
    method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    if options.share_weights and method not in (None, "bitsandbytes"):
        raise UnsupportedError(
            f"{options.model} is quantized with {method!r}: only unquantized and"
            " bitsandbytes 4-bit weights can be shared with"
            " the trainer",
            where="model.model_name",
            fix="use the unquantized checkpoint, or load_in_4bit: true on it",
        )
    if (options.load_in_4bit or method == "bitsandbytes") and device != "cuda":
        raise UnsupportedError(
            "4-bit weights need a CUDA GPU",
            where="model.load_in_4bit",
            fix="set load_in_4bit: false on this machine",
        )
    architectures = list(getattr(config, "architectures", None) or [])
    known = ModelRegistry.get_supported_archs()
    if not any(name in known for name in architectures):
        raise UnsupportedError(
            f"vLLM has no model for {', '.join(architectures) or 'a config without architectures'}",
            where="model.model_name",
            fix="set fast_inference: false (runtime.engine: transformers)",
        )


def read_config(options: EngineOptions) -> Any:
    """The checkpoint's Hugging Face config.

    Raises:
        InputError: it is not there, or cannot be read.
    """
    try:
        return transformers.AutoConfig.from_pretrained(options.model, revision=options.revision)
    except (OSError, ValueError) as problem:
        raise InputError(
            f"no readable model config: {str(problem).splitlines()[0]}",
            where=options.model,
            fix="check the folder or the hub id (and HF_HUB_OFFLINE, if it is set)",
        ) from problem
