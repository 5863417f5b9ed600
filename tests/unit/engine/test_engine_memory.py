"""The memory that vLLM's worker reports. Releases of vLLM name the attributes differently."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from toolkit.engine.engine_memory import asleep_bytes, read_worker_memory

COMMON_ATTRIBUTES = {
    "model_runner": SimpleNamespace(model_memory_usage=3_000),
    "available_kv_cache_memory_bytes": 9_000,
    "cudagraph_memory_estimate": 50,
}
EXPECTED_TERMS = {
    "engine.loaded": 3_000,
    "engine.activations": 700,
    "engine.runtime": 200,
    "engine.cuda_graphs": 50,
    "engine.kv": 9_000,
}


@pytest.mark.parametrize(
    "worker",
    [
        {"non_torch_memory": 200, "peak_activation_memory": 700},  # 0.25.1
        {"total_consumed": 3_200, "peak_activation_memory": 750},  # 0.31.0
    ],
    ids=["0.25.1", "0.31.0"],
)
def test_the_worker_memory_has_the_names_of_sizing_terms(worker: dict[str, int]) -> None:
    assert read_worker_memory(SimpleNamespace(**COMMON_ATTRIBUTES, **worker)) == EXPECTED_TERMS


def test_terms_that_were_not_measured_are_omitted() -> None:
    worker = SimpleNamespace(model_runner=SimpleNamespace(model_memory_usage=3_000))
    assert read_worker_memory(worker) == {"engine.loaded": 3_000}


def test_asleep_bytes_counts_only_sleeping_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    def allocation(nbytes: int, *, asleep: bool) -> Any:
        return SimpleNamespace(handle=(0, nbytes, 0, 0), is_asleep=asleep)

    allocations = {0: allocation(5, asleep=True), 1: allocation(7, asleep=False)}
    allocator = SimpleNamespace(instance=SimpleNamespace(pointer_to_data=allocations))
    name = "vllm.device_allocator.cumem"
    monkeypatch.delitem(sys.modules, name, raising=False)
    assert asleep_bytes() == 0  # not imported: no allocation can be asleep
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(CuMemAllocator=allocator))
    assert asleep_bytes() == 5
    allocator.instance = None
    assert asleep_bytes() == 0
