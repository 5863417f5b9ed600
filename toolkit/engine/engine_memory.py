"""Read vLLM's own memory figures, and compute the size of a KV cache whose memory is released
(asleep).

The figures have the names of the terms of the toolkit's memory estimate, so that both can be
compared.

Written for vLLM 0.25.1 and 0.31.0 (``v1/worker/gpu_worker.py``, ``determine_available_memory``).
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from toolkit.engine.dequantized import COPIES_ATTRIBUTE
from toolkit.engine.vllm_internals import device_type, open_internals, open_worker

if TYPE_CHECKING:
    from vllm import LLM


def engine_memory(llm: LLM) -> dict[str, int]:
    """Return the bytes of each memory term as vLLM's worker measured them when it started. The
    result is empty on the CPU.

    ``engine.loaded`` is the sum of the weights, the LoRA slots and the tables of rotary position
    embeddings. A term that vLLM did not measure is omitted. For example, vLLM does not
    measure the activations if the size of the KV cache is configured.
    """
    if device_type() != "cuda":
        return {}
    term_bytes = read_worker_memory(open_worker(llm))
    copies = getattr(open_internals(llm).module, COPIES_ATTRIBUTE, None)
    if copies is not None:
        # The copies are created in the profiling run, so vLLM counts them as activations.
        term_bytes["engine.dequantized"] = copies.nbytes
        if "engine.activations" in term_bytes:
            term_bytes["engine.activations"] = max(
                1, term_bytes["engine.activations"] - copies.nbytes
            )
    return term_bytes


def read_worker_memory(worker: Any) -> dict[str, int]:
    """Return the memory terms (name to bytes) that one vLLM worker measured."""

    def read(name: str) -> int:
        return int(getattr(worker, name, 0) or 0)

    loaded = int(worker.model_runner.model_memory_usage)
    graphs, activations = read("cudagraph_memory_estimate"), read("peak_activation_memory")
    runtime = read("non_torch_memory")
    # vLLM 0.31 measures one total, and counts CUDA graphs as a part of the activations.
    if hasattr(worker, "total_consumed"):
        runtime = read("total_consumed") - loaded
        activations -= graphs
    term_bytes = {
        "engine.loaded": loaded,
        "engine.activations": activations,
        "engine.runtime": runtime,
        "engine.cuda_graphs": graphs,
        "engine.kv": read("available_kv_cache_memory_bytes"),
    }
    return {term: nbytes for term, nbytes in term_bytes.items() if nbytes > 0}


def asleep_bytes() -> int:
    """Return the bytes of a KV cache that is asleep. torch counts these bytes as allocated, but no
    memory is mapped for them now.
    """
    # The module is not imported here, because it needs the CUDA runtime. If it is not loaded, no
    # cache can be asleep.
    cumem = sys.modules.get("vllm.device_allocator.cumem")
    allocator = None if cumem is None else cumem.CuMemAllocator.instance
    if allocator is None:
        return 0
    return sum(int(data.handle[1]) for data in allocator.pointer_to_data.values() if data.is_asleep)
