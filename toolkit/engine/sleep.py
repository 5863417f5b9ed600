"""Release the memory of the KV cache while the trainer works, and keep the shared weights (KV-only
sleep).

vLLM's own sleep also unmaps the weights (level 1 moves them to the host, level 2 drops them), so
the trainer's views would point to unmapped memory. vLLM's factory of sleep backends
(``vllm/device_allocator/sleep_mode_backend.py``, 0.25.1 to 0.31.0) supports other backends:
``KvOnlyBackend`` releases only the allocations with the tag ``kv_cache``.
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

NAME = "toolkit_kv"
KV_TAG = "kv_cache"


class KvOnlyBackend(SleepModeBackend):  # type: ignore[misc]  # vllm ships no types
    """Releases allocations with the tag ``kv_cache`` and maps them again. The cache's contents are
    lost, as in vLLM's own sleep.
    """

    def suspend(self, level: int = 1) -> None:
        """Release the KV cache, for every ``level``."""
        del level
        self._state = "SUSPENDED"
        release_tag(KV_TAG)

    def resume(self, tags: list[str] | None = None) -> None:
        """Map the KV cache again, unless ``tags`` has only other tags."""
        if tags is not None and KV_TAG not in tags:
            return
        self._state = "RESUMING"
        map_tag(KV_TAG)
        self._state = "RUNNING"

    def discard(self, tags: tuple[str, ...]) -> None:
        """Release the KV cache if it is among ``tags``; weights are never released."""
        if KV_TAG in tags:
            self._state = "SUSPENDED"
            release_tag(KV_TAG)

    @classmethod
    def preserves_communicators(cls) -> bool:
        """True, because communicator buffers are outside the pool."""
        return True

    @classmethod
    def preserves_compiled_artifacts(cls) -> bool:
        """True, because addresses stay reserved, so compiled code and CUDA graphs stay valid."""
        return True


def register() -> None:
    """Register the backend in vLLM's factory, once."""
    if NAME not in SleepModeBackendFactory._registry:
        SleepModeBackendFactory.register_backend(NAME, __name__, KvOnlyBackend.__name__)


def release_tag(tag: str) -> None:
    """Release the memory of every mapped allocation with the tag ``tag``; its addresses stay
    reserved.
    """
    allocator, unmap_and_release, _ = _allocator()
    for data in allocator.pointer_to_data.values():
        if data.tag == tag and not data.is_asleep:
            torch.cuda.synchronize()
            unmap_and_release(data.handle)
            data.is_asleep = True


def map_tag(tag: str, spare_bytes: int | None = None) -> None:
    """Map memory at the addresses of every released allocation with the tag ``tag``; its contents
    are undefined. torch keeps its cached memory if ``spare_bytes`` stay free in addition.
    """
    allocator, _, create_and_map = _allocator()
    asleep = [
        data for data in allocator.pointer_to_data.values() if data.tag == tag and data.is_asleep
    ]
    needed = sum(int(data.handle[1]) for data in asleep)
    enough = spare_bytes is not None and torch.cuda.mem_get_info()[0] >= needed + spare_bytes
    if asleep and not enough:
        # The trainer's step leaves memory of its activations in torch's cache. Without this call
        # the GPU would need memory for the activations and the KV cache at once, which sleep must
        # avoid.
        torch.cuda.empty_cache()
    for data in asleep:
        create_and_map(data.handle)
        data.is_asleep = False


@contextmanager
def tagged_pool(tag: str) -> Iterator[None]:
    """Tensors that are created in the block can be released and mapped by ``tag``, also without
    ``enable_sleep_mode``. Each tag has one pool.
    """
    allocator, _, _ = _allocator()
    with allocator.use_memory_pool(tag=tag):
        yield


def drop_pool(tag: str) -> None:
    """Free the pool of ``tag`` after its tensors were dropped. vLLM keeps pools for the process,
    and counts their memory before it loads another model.

    torch's pool must be freed before the allocator that it references
    (``CuMemAllocator.release_pools``).
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
    """vLLM's allocator of this process and its two primitives. The import is here because it needs
    CUDA.
    """
    from vllm.device_allocator import cumem  # noqa: PLC0415 - needs the CUDA runtime library

    return cumem.CuMemAllocator.get_instance(), cumem.unmap_and_release, cumem.create_and_map


class KvSleep:
    """Puts one engine that was built with ``enable_sleep_mode`` to sleep and wakes it."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self.asleep = False
        # The worker looks up its backend by this name at its first sleep; there is no engine
        # argument for it (0.25.1, 0.31.0).
        llm.llm_engine.vllm_config.model_config.sleep_mode_backend = NAME

    def sleep(self) -> None:
        """Release the KV cache. With level 1 the worker does not copy buffers."""
        if not self.asleep:
            self._llm.sleep(level=1)
            self.asleep = True

    def wake(self) -> None:
        """Map the KV cache again: first its tag, then the rest, which has no effect because weights
        were not released.
        """
        if self.asleep:
            self._llm.wake_up()
            self.asleep = False

    def wake_for_close(self) -> None:
        """Map the KV cache before a shut-down, because freeing unmapped memory would fail."""
        self.wake()
