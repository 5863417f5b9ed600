"""Start an engine from its options.

Importing this module imports vLLM. So import it only through ``open_engine``, which first sets
vLLM's environment variables.
"""

from __future__ import annotations

import gc
import os
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import transformers
import vllm
from vllm import LLM
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
from vllm.model_executor.models.registry import ModelRegistry

from toolkit.base.errors import ConfigError, InputError, ToolkitError, UnsupportedError, first_line
from toolkit.base.process_environment import local_rank, world_size
from toolkit.config.lora_targets import has_experts
from toolkit.config.parallel import parallel_size
from toolkit.config.supported_features import (
    cpu_engine_problem,
    storage_format,
    untied_head_problem,
)
from toolkit.engine import cpu_experts, sleep, weight_loader
from toolkit.engine.engine import Engine
from toolkit.engine.group_checks import check_groups
from toolkit.engine.lora_tables import use_table
from toolkit.engine.mesh import create_default_group, gather_from_all, open_mesh
from toolkit.engine.rollout_request import Sampling
from toolkit.engine.token_generation import to_sampling_params
from toolkit.engine.vllm_errors import to_toolkit_error
from toolkit.engine.vllm_internals import device_type, sampling_of_warm_up

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toolkit.engine.engine_options import EngineOptions


_SET_NUM_THREADS = torch.set_num_threads  # torch's own function, which an engine may replace
_last_engine: weakref.ref[Engine] | None = None
"""The last engine that was started in this process."""


def start_engine(options: EngineOptions) -> Engine:
    """Check the options and the model, start vLLM, and return the engine. The checks take little
    time and run before the model is loaded.
    """
    global _last_engine
    had_engine = _last_engine is not None
    if had_engine:
        free_previous_engine()
    size = parallel_size(options.tensor_parallel_size)
    device = device_type()
    check_groups(
        size,
        torch.cuda.get_device_name(local_rank()) if device == "cuda" else None,
        gather_from_all,
    )
    config = check_model(options, device)
    weight_loader.register()
    sleep.register()
    arguments = options.to_vllm("cuda" if device == "cuda" else "cpu")
    if device == "cuda":
        add_gpu_arguments(arguments, options, config)
    if device == "cpu":
        cpu_experts.register()
        add_cpu_arguments(arguments)
    if world_size() > 1:  # torchrun: one engine per rank
        create_default_group()
        arguments.setdefault("distributed_executor_backend", "external_launcher")
    owns_process_group = not torch.distributed.is_initialized()
    try:
        with present_objects_frozen(), torch_settings_restored():
            llm = start_vllm(arguments, config)
            open_mesh(size)
            engine = Engine(llm, options, owns_process_group=owns_process_group)
    except ToolkitError:
        raise
    except Exception as problem:
        raise to_toolkit_error(problem, "the engine did not start") from problem
    _last_engine = weakref.ref(engine)
    if had_engine:
        # vLLM has called gc.freeze(), which also freezes the model of a previous engine. Unfreeze
        # all objects, so that the weights of that model are freed when the caller drops the model.
        gc.unfreeze()
    return engine


@contextmanager
def torch_settings_restored() -> Iterator[None]:
    """A context manager for the start of vLLM. It restores torch's random generator, which vLLM
    seeds, and ``torch.set_num_threads``, which vLLM's CPU worker replaces by a function without
    effect (0.31.0). The trainer runs in this process too, and needs both.
    """
    rng_state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(rng_state)
        torch.set_num_threads = _SET_NUM_THREADS


@contextmanager
def present_objects_frozen() -> Iterator[None]:
    """A context manager for the start of vLLM. Python's garbage collector skips all objects that
    existed before the body, until ``gc.unfreeze``, which is called if the body fails.

    vLLM runs the collector several times while it starts. Each time, the collector would search the
    800,000 objects of the imported libraries for 0.7 s. At the end of its start, vLLM freezes all
    objects anyway. Garbage that holds GPU memory is collected first, because vLLM needs the memory.
    """
    if torch.cuda.is_available() and torch.cuda.memory_allocated():
        gc.collect()
        torch.cuda.empty_cache()
    gc.freeze()
    try:
        yield
    except BaseException:
        gc.unfreeze()
        raise


def start_vllm(arguments: dict[str, Any], config: Any) -> LLM:
    """Start vLLM with its keyword ``arguments`` for the model with ``config``. The warm-up compiles
    only kernels that a run with the default sampling options uses.
    """
    import_model_classes(config)
    with sampling_of_warm_up(to_sampling_params(Sampling(max_tokens=2), seed=0)):
        return LLM(**arguments)


def use_gloo_all_reduce() -> None:
    """Make vLLM's CPU workers sum tensors over torch.distributed (gloo) instead of over shared
    memory.

    vLLM's own sums over shared memory (``CpuCommunicator``, 0.31.0) have two problems. A process
    waits forever if another process has ended. And with external_launcher, all runs on a machine
    use the same name for the shared memory.
    """
    from vllm.distributed.device_communicators import cpu_communicator  # noqa: PLC0415 - CPU only

    communicator: Any = cpu_communicator.CpuCommunicator
    communicator._all_group_ranks_share_shm_group_name = lambda _: False


def free_previous_engine() -> None:
    """Free a previous engine that is no longer referenced, and check that no other engine is open.

    Two engines cannot be open in one process. vLLM has only one set of process groups and one
    memory pool for sleep mode per process, so closing one engine would break the other.

    Raises:
        ConfigError: another engine is open and still referenced.
    """
    gc.unfreeze()  # vLLM froze all objects that existed when it started
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    engine = _last_engine() if _last_engine is not None else None
    if engine is not None and not engine.closed:
        raise ConfigError(
            f"another engine with the model {engine.options.model} is open in this process",
            where="engine",
            fix=("call `model.toolkit_engine.close()` on the model that was loaded before"),
        )


def add_cpu_arguments(arguments: dict[str, Any]) -> None:
    """Add to ``arguments`` the arguments that vLLM's CPU worker needs.

    Chunked prefill is switched off. With chunked prefill, vLLM resets the random generator of a
    request to an earlier offset after it has processed a part of the prompt. torch's CPU generators
    cannot do that ("CPU Generator does not use offset", 0.25.1 to 0.31.0).
    """
    if arguments.get("tensor_parallel_size", 1) > 1:
        use_gloo_all_reduce()
    arguments.setdefault("kv_cache_memory_bytes", CPU_KV_CACHE_BYTES)
    if os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        del arguments["kv_cache_memory_bytes"]
    arguments["enable_chunked_prefill"] = False
    length, tokens = arguments.get("max_model_len"), arguments.get("max_num_batched_tokens")
    if length and tokens:
        arguments["max_num_batched_tokens"] = max(length, tokens)


def add_gpu_arguments(arguments: dict[str, Any], options: EngineOptions, config: Any) -> None:
    """Add to ``arguments`` the arguments that vLLM's GPU worker needs for expert layers and for
    16-bit copies of 4-bit weights. Also choose the table of tuned LoRA kernels for the GPU.
    """
    if options.share_weights and has_experts(config.to_dict()):
        # Triton is the only backend that does not change the expert weights after loading.
        arguments.setdefault("moe_backend", "triton")
    if has_4bit_weights(options, config):
        weight_loader.register_dequantizing()
        if options.dequantized_rollouts:
            arguments["model_loader_extra_config"] = {
                weight_loader.COPIES_OPTION: options.dequantized_rollouts
            }
    if options.enable_lora:
        use_table(torch.cuda.get_device_name(), vllm.__version__)


CPU_KV_CACHE_BYTES = 1 << 30
"""The KV cache size of a CPU engine, in bytes. It is used if neither the options nor the
environment variable VLLM_CPU_KVCACHE_SPACE set the size.
"""


def check_model(options: EngineOptions, device: str) -> Any:
    """Check that the engine supports the model, and return the model's Hugging Face config. This
    runs before the model is loaded, because loading takes minutes.

    Raises:
        InputError: the model has no readable config.
        UnsupportedError: the model has FP8 weights, 4-bit weights without CUDA, or an architecture
            that vLLM does not support.
    """
    config = read_config(options)
    values = config.to_dict()
    stored = storage_format(values)
    if options.share_weights and stored is not None and not stored.shares_weights:
        raise UnsupportedError(
            f"{options.model} is stored in {stored.name}, but only unquantized and bitsandbytes "
            "4-bit weights can be shared with the trainer",
            where="model.model_name",
            fix="use the unquantized checkpoint of the model. To save memory, set "
            "`load_in_4bit: true`",
        )
    problem = untied_head_problem(values) or (
        cpu_engine_problem(values) if device == "cpu" else None
    )
    if problem is not None:
        raise UnsupportedError(problem.message, where=problem.key, fix=_USE_TRANSFORMERS)
    if (options.load_in_4bit or stored is not None) and device != "cuda":
        raise UnsupportedError(
            "4-bit weights need a CUDA GPU",
            where="model.load_in_4bit",
            fix="set load_in_4bit: false on this machine",
        )
    if options.load_in_4bit and "bitsandbytes" not in QUANTIZATION_METHODS:
        raise UnsupportedError(
            f"vLLM {vllm.__version__} does not support bitsandbytes 4-bit weights",
            where="model.load_in_4bit",
            fix="install the version of vLLM that is in the lock files, or set `load_in_4bit: "
            "false`",
        )
    architectures = list(getattr(config, "architectures", None) or [])
    supported = ModelRegistry.get_supported_archs()
    if not any(name in supported for name in architectures):
        raise UnsupportedError(
            "vLLM does not support the architecture of the model "
            f"({', '.join(architectures) or 'the config has no architectures'})",
            where="model.model_name",
            fix=_USE_TRANSFORMERS,
        )
    return config


def import_model_classes(config: Any) -> None:
    """Import vLLM's classes for the model with ``config``, and register them in vLLM's registry.

    vLLM inspects a class that is not registered in a second process, and keeps the result in its
    cache folder (0.25.1 and 0.31.0). With an empty cache folder, the second process imports torch
    and vLLM again: 9 s with warm files, 28 s with cold files (8B model, H200).
    """
    for name in getattr(config, "architectures", None) or []:
        entry = ModelRegistry.models.get(name)
        if entry is not None:
            ModelRegistry.register_model(name, entry.load_model_cls())


_USE_TRANSFORMERS = "set `fast_inference: false` (in a run file: `runtime.engine: transformers`)"


def has_4bit_weights(options: EngineOptions, config: Any) -> bool:
    """Return True if vLLM uses its bitsandbytes loader for the model."""
    stored = storage_format(config.to_dict())
    is_4bit = options.load_in_4bit or (stored is not None and stored.shares_weights)
    return is_4bit and options.tensor_parallel_size == 1


def read_config(options: EngineOptions) -> Any:
    """Read the checkpoint's Hugging Face config.

    Raises:
        InputError: the config does not exist or cannot be read.
    """
    try:
        return transformers.AutoConfig.from_pretrained(options.model, revision=options.revision)
    except (OSError, ValueError) as problem:
        raise InputError(
            f"the model config cannot be read: {first_line(problem)}",
            where=options.model,
            fix="check the path or the hub id of the model. If the environment variable "
            "`HF_HUB_OFFLINE` is set, check that the model is in the local cache",
        ) from problem
