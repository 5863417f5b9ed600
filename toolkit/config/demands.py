"""What a run asks of its node, as plain values under the names of ``gpu``'s ``CheckContext``.

``config`` and ``gpu`` do not know each other: ``envcheck check --config`` and a run's own
pre-flight carry these over, so that both judge a node alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolkit.config.model import RunConfig


def demands(run: RunConfig) -> dict[str, Any]:
    """The fields that a run file alone decides; None is what sizing will choose."""
    model = run.model
    engine: str = run.runtime.engine
    if engine == "auto" and model.fast_inference is True:
        engine = "vllm"
    share = model.gpu_memory_utilization
    return {
        "configured": True,
        "engine": engine,
        "load_in_4bit": model.load_in_4bit,
        "float8_kv_cache": model.float8_kv_cache,
        "dtype": model.dtype,
        "gpu_memory_utilization": None if share == "auto" else float(share),
        "tensor_parallel_size": model.tensor_parallel_size,
        "model": model.model_name,
        "revision": model.revision,
    }
