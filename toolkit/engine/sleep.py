"""Release the memory of the KV cache while the trainer works, and keep the shared weights.

vLLM's own sleep also unmaps the memory of the weights: level 1 copies the weights to the host, and
level 2 drops them. The trainer shares these weights, so its tensors would then point to unmapped
memory. Therefore this module registers its own backend in vLLM's factory of sleep backends
(``vllm/device_allocator/sleep_mode_backend.py``, 0.25.1 to 0.31.0). ``KvOnlyBackend`` releases only
the allocations with the tag ``kv_cache``.
"""

from __future__ import annotations

import gc
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from vllm.device_allocator.sleep_mode_backend import SleepModeBackend, SleepModeBackendFactory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm import LLM

BACKEND_NAME = "toolkit_kv"
KV_TAG = "kv_cache"


class KvOnlyBackend(SleepModeBackend):  # type: ignore[misc]  # vllm ships no types
    """Releases the memory of allocations with the tag ``kv_cache``, and maps memory for them again.
    The contents of the KV cache are lost, as in vLLM's own sleep.
    """

    def suspend(self, level: int = 1) -> None:
        """Release the KV cache. ``level`` has no effect."""
        del level
        self._state = "SUSPENDED"
        release_tag(KV_TAG)

    def resume(self, tags: list[str] | None = None) -> None:
        """Map the KV cache again if ``tags`` is None or contains ``kv_cache``."""
        if tags is not None and KV_TAG not in tags:
            return
        self._state = "RESUMING"
        map_tag(KV_TAG)
        self._state = "RUNNING"

    def discard(self, tags: tuple[str, ...]) -> None:
        """Release the KV cache if ``tags`` contains ``kv_cache``. Weights are never released."""
        if KV_TAG in tags:
            self._state = "SUSPENDED"
            release_tag(KV_TAG)

    @classmethod
    def preserves_communicators(cls) -> bool:
        """Return True, because communicator buffers are not in the memory that is released."""
        return True

    @classmethod
    def preserves_compiled_artifacts(cls) -> bool:
        """Return True, because the addresses of released memory stay reserved. So compiled code and
        CUDA graphs stay valid.
        """
        return True


def register() -> None:
    """Register ``KvOnlyBackend`` in vLLM's factory. A second call has no effect."""
    if BACKEND_NAME not in SleepModeBackendFactory._registry:
        SleepModeBackendFactory.register_backend(BACKEND_NAME, __name__, KvOnlyBackend.__name__)


def release_tag(tag: str) -> None:
    """Release the memory of every mapped allocation with the tag ``tag``. The addresses stay
    reserved.
    """
    allocator, unmap_and_release, _ = _allocator()
    for data in allocator.pointer_to_data.values():
        if data.tag == tag and not data.is_asleep:
            torch.cuda.synchronize()
            unmap_and_release(data.handle)
            data.is_asleep = True


def map_tag(tag: str) -> None:
    """Map memory again for every allocation with the tag ``tag`` that was released. First release
    the memory that torch has cached. Then map new memory at the old addresses. The contents of the
    new memory are undefined.
    """
    allocator, _, create_and_map = _allocator()
    asleep = [
        data for data in allocator.pointer_to_data.values() if data.tag == tag and data.is_asleep
    ]
    if asleep:
        # After the trainer's step, torch's cache still has the memory of the activations. Without
        # this call the GPU would need memory for the activations and for these allocations at the
        # same time, which is more than `envcheck size` predicts.
        torch.cuda.empty_cache()
    for data in asleep:
        create_and_map(data.handle)
        data.is_asleep = False


@contextmanager
def tagged_pool(tag: str) -> Iterator[None]:
    """A context manager. New tensors in the block get memory from the pool of ``tag``.
    ``release_tag`` and ``map_tag`` can then release this memory and map it again, also in an engine
    without ``enable_sleep_mode``.
    """
    allocator, _, _ = _allocator()
    with allocator.use_memory_pool(tag=tag):
        yield


def free_pool(tag: str) -> None:
    """Free the memory pool of ``tag``. The tensors in the pool must have been dropped before.

    vLLM itself would keep the pool until the process ends, and would count its memory as used when
    another model is loaded. torch's pool references an allocator, and must be freed before this
    allocator (as in ``CuMemAllocator.release_pools``).
    """
    allocator, _, _ = _allocator()
    entry = allocator.allocator_and_pools.pop(tag, None)
    if entry is None:
        return
    pool, keeps_alive = entry
    del entry, pool
    gc.collect()
    torch.cuda.empty_cache()
    del keeps_alive


def _allocator() -> tuple[Any, Any, Any]:
    """Return three objects of vLLM: its memory allocator in this process, the function that unmaps
    memory, and the function that maps memory. vLLM's module ``cumem`` is imported only here,
    because the import needs CUDA.
    """
    from vllm.device_allocator import cumem  # noqa: PLC0415 - needs the CUDA runtime library

    return cumem.CuMemAllocator.get_instance(), cumem.unmap_and_release, cumem.create_and_map


class KvSleep:
    """Releases the memory of the KV cache of one engine, and maps it again. The engine must be
    built with ``enable_sleep_mode``.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self.asleep = False
        # The worker looks up its sleep backend by this name at its first sleep. vLLM has no engine
        # argument for the name (0.25.1, 0.31.0), so the config is changed here.
        llm.llm_engine.vllm_config.model_config.sleep_mode_backend = BACKEND_NAME

    def sleep(self) -> None:
        """Release the KV cache. vLLM's sleep is called with level 1, because at level 2 vLLM's
        worker would also copy the model's buffers.
        """
        if not self.asleep:
            self._llm.sleep(level=1)
            self.asleep = True

    def wake(self) -> None:
        """Map the KV cache again. Does nothing if the engine is awake."""
        if self.asleep:
            self._llm.wake_up()
            self.asleep = False

    def wake_for_close(self) -> None:
        """Map the KV cache before a shut-down, because freeing unmapped memory would fail."""
        self.wake()
