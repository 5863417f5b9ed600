"""Access vLLM's internals (0.25.1 and 0.31.0). Each function of this module accesses one internal
function or attribute.

``tests/contract/test_vllm_seams.py`` checks each of these internals. If a new version of vLLM has
changed one of them, the test names it.
"""

from __future__ import annotations

import gc
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm import SamplingParams
from vllm.distributed import parallel_state
from vllm.platforms import current_platform

from toolkit.base.errors import DefectError, UnsupportedError
from toolkit.engine.lora_kernels import clear_pointer_cache

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn
    from vllm import LLM


@dataclass(frozen=True, slots=True)
class EngineInternals:
    """The internals of a started engine. ``runner`` is vLLM's model runner. ``module`` is the
    runner's model (a torch module). ``lora_manager`` is vLLM's manager of the adapter slots (None
    without LoRA).
    """

    runner: Any
    module: nn.Module
    lora_manager: Any | None


def device_type() -> str:
    """Return the platform that vLLM runs on, ``"cuda"`` or ``"cpu"``.

    Raises:
        UnsupportedError: vLLM runs on another platform.
    """
    if current_platform.is_cuda_alike():
        return "cuda"
    if current_platform.is_cpu():
        return "cpu"
    raise UnsupportedError(
        f"vLLM runs on {current_platform.device_name or 'an unknown device'} on this machine, but "
        "the toolkit's engine supports only CUDA and CPU",
        fix="set `fast_inference: false` (in a run file: `runtime.engine: transformers`)",
    )


def open_worker(llm: LLM) -> Any:
    """Return the worker of an engine that runs in this process. Such an engine has one worker.

    Raises:
        UnsupportedError: the engine has several workers.
    """
    workers = llm.collective_rpc(_return_worker)
    if len(workers) != 1:
        raise UnsupportedError(
            f"the engine has {len(workers)} workers, but weight sharing needs exactly one",
            fix="set tensor_parallel_size: 1",
        )
    return getattr(workers[0], "worker", workers[0])


def open_internals(llm: LLM) -> EngineInternals:
    """Return the internals of an engine that runs in this process."""
    runner = open_worker(llm).model_runner
    manager = getattr(runner, "lora_manager", None)
    slots = None if manager is None else manager._adapter_manager
    module = runner.get_model()
    if module is None:
        raise DefectError("vLLM's runner has no model")
    return EngineInternals(runner=runner, module=module, lora_manager=slots)


def _return_worker(worker: Any) -> Any:
    return worker


@contextmanager
def sampling_of_warm_up(sampling: SamplingParams) -> Iterator[None]:
    """A context manager for the start of an engine. vLLM's warm-up on a GPU samples with
    ``sampling``.

    By default the warm-up uses every sampling option, and so compiles the kernels of all of them
    (``SamplingParams.for_sampler_warmup``, 0.25.1 and 0.31.0). The kernel for top-k and top-p alone
    takes 10 s (H200), and most runs do not use it. A run that uses more options than ``sampling``
    compiles their kernels in its first rollout.
    """
    original = SamplingParams.__dict__["for_sampler_warmup"]
    SamplingParams.for_sampler_warmup = staticmethod(sampling.clone)
    try:
        yield
    finally:
        SamplingParams.for_sampler_warmup = original


def drop_requests(llm: LLM) -> None:
    """Remove every request from an engine in which a step raised an error, and free torch's cached
    memory. The engine can then be used again.

    vLLM treats such an engine as unusable, because the error may have any cause. But after a failed
    allocation the engine's state is intact, except for what the failed step left: requests in the
    output processor and the scheduler, batches that still run (asynchronous scheduling), and the
    runner's record of a forward pass whose tokens were not sampled yet. This function removes these
    objects.
    """
    engine = llm.llm_engine
    engine.abort_request(list(engine.output_processor.request_states), internal=True)
    core = engine.engine_core.engine_core
    if core.batch_queue is not None:
        core.batch_queue.clear()
    open_internals(llm).runner.execute_model_state = None
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def shut_down(llm: LLM, *, keep_process_group: bool) -> None:
    """Stop the engine core of this process.

    vLLM's own shut-down always destroys torch.distributed's default group. If the trainer created
    that group, pass ``keep_process_group``. Then only the engine's own groups are destroyed.
    """
    reset_graph_pool()
    clear_pointer_cache()
    client = llm.llm_engine.engine_core
    if not keep_process_group:
        client.shutdown()
        return
    # In vLLM 0.31.0 the client has a finalizer, which would shut the engine down a second time.
    finalizer = getattr(client, "_finalizer", None)
    if finalizer is not None:
        finalizer.detach()
    core = client.engine_core
    core.structured_output_manager.clear_backend()
    core.model_executor.shutdown()
    core.scheduler.shutdown()
    gc.unfreeze()
    parallel_state.destroy_model_parallel()
    if parallel_state._WORLD is not None:  # vLLM's group, which is not the trainer's
        parallel_state._WORLD.destroy()
        parallel_state._WORLD = None


def reset_graph_pool() -> None:
    """Make the next engine of this process capture its CUDA graphs into a new memory pool.

    vLLM keeps one pool handle for the whole process (``Platform.get_global_graph_pool``, 0.25.1 and
    0.31.0). When the graphs of the first engine are freed, torch drops the pool of this handle. A
    later capture into the same pool would fail with an internal assertion of torch's allocator.
    """
    platform: Any = type(current_platform)
    platform._global_graph_pool = None
