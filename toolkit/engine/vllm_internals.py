"""Access vLLM's internals. Every use of them is one function of this module, for vLLM 0.25.1 and
0.31.0.

``tests/contract/test_vllm_seams.py`` checks each internal and names the one that upstream changed.
"""

from __future__ import annotations

import gc
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed import parallel_state
from vllm.platforms import current_platform

from toolkit.base.errors import DefectError, UnsupportedError

if TYPE_CHECKING:
    from torch import nn
    from vllm import LLM


@dataclass(frozen=True, slots=True)
class Internals:
    """The internals of a started engine: the runner, its module of the model, and the slots of its
    adapters (None without LoRA).
    """

    runner: Any
    module: nn.Module
    slots: Any | None


def device_type() -> str:
    """``"cuda"`` or ``"cpu"``: the platform that vLLM was built for and found."""
    if current_platform.is_cuda_alike():
        return "cuda"
    if current_platform.is_cpu():
        return "cpu"
    raise UnsupportedError(
        f"vLLM runs on {current_platform.device_name or 'an unknown device'} on this machine; the "
        "toolkit's engine supports CUDA and CPU",
        fix="set fast_inference: false (runtime.engine: transformers)",
    )


def open_worker(llm: LLM) -> Any:
    """The only worker of an engine that runs in this process."""
    workers = llm.collective_rpc(_itself)
    if len(workers) != 1:
        raise UnsupportedError(
            f"the engine has {len(workers)} workers, but weight sharing needs exactly one",
            fix="use tensor_parallel_size: 1",
        )
    return getattr(workers[0], "worker", workers[0])


def open_internals(llm: LLM) -> Internals:
    """The internals of an engine that runs in this process."""
    runner = open_worker(llm).model_runner
    manager = getattr(runner, "lora_manager", None)
    slots = None if manager is None else manager._adapter_manager
    module = runner.get_model()
    if module is None:
        raise DefectError("vLLM's runner has no model")
    return Internals(runner=runner, module=module, slots=slots)


def _itself(worker: Any) -> Any:
    return worker


def drop_requests(llm: LLM) -> None:
    """Remove every request from an engine whose step raised, so that it can be used again, and free
    the blocks that torch caches.

    vLLM treats such an engine as unusable, because it cannot know what failed. But after a failed
    allocation its state is intact. A failed step leaves requests in the output processor and the
    scheduler, running batches (asynchronous scheduling), and the runner's record of a forward pass
    whose tokens were not sampled yet.
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

    vLLM's own shut-down always destroys torch.distributed's default group. With
    ``keep_process_group`` (the trainer created the group) only the engine's part is shut down.
    """
    forget_graph_pool()
    forget_pointers()
    client = llm.llm_engine.engine_core
    if not keep_process_group:
        client.shutdown()
        return
    finalizer = getattr(client, "_finalizer", None)  # 0.31.0: it would shut down again later
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


def forget_pointers() -> None:
    """Clear the LoRA kernels' cache of weight addresses.

    The kernels cache addresses, strides and offsets by the address of the first byte, for the whole
    process (``lora/ops/triton_ops/utils.py``, 0.25.1 and 0.31.0). Another engine may have other
    shapes at the same address.
    """
    # Not imported here, because only kernels that have run have a cache.
    kernels = sys.modules.get("vllm.lora.ops.triton_ops.utils")
    if kernels is not None:
        kernels._LORA_A_PTR_DICT.clear()
        kernels._LORA_B_PTR_DICT.clear()


def forget_graph_pool() -> None:
    """Make the next engine of this process capture its CUDA graphs into its own pool.

    vLLM keeps one pool handle for the whole process (``Platform.get_global_graph_pool``, 0.25.1 and
    0.31.0). torch drops that pool when the first engine's graphs are freed, and a later capture
    into it fails with an internal assertion of its allocator.
    """
    kind: Any = type(current_platform)
    kind._global_graph_pool = None
