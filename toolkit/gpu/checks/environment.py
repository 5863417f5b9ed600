"""Environment variables that harm a run, each with its effect."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.base.process_environment import VARIABLES, WANTED, expands
from toolkit.gpu.checks.check import CheckContext, Outcome, ok, warn

if TYPE_CHECKING:
    from collections.abc import Mapping

    from toolkit.gpu.snapshot import NodeSnapshot

_ON = ("1", "true", "yes", "on")


def env(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """No environment variable harms the run."""
    del context
    harms = [*_rigid(snapshot.environment), *harmful(snapshot.environment)]
    return warn("; ".join(harms)) if harms else ok("no harmful variable")


def _rigid(variables: Mapping[str, str]) -> list[str]:
    """Allocator settings that lack expandable segments. Training sets them if nothing is set
    (policy/cuda_allocator.py), and the sizer assumes them.
    """
    written = {name: variables[name] for name in VARIABLES if variables.get(name)}
    return [
        f"{name}={value}: without {WANTED} memory is lost to fragmentation, which the sizer "
        "does not include"
        for name, value in written.items()
        if not expands(value)
    ]


def harmful(variables: Mapping[str, str]) -> list[str]:
    """The variables that slow a run down or change what it runs on."""
    found = []
    if variables.get("CUDA_LAUNCH_BLOCKING", "").lower() in _ON:
        found.append("CUDA_LAUNCH_BLOCKING=1: every kernel waits for the previous one")
    if variables.get("PYTORCH_NO_CUDA_MEMORY_CACHING", "").lower() in _ON:
        found.append("PYTORCH_NO_CUDA_MEMORY_CACHING: every allocation goes to the driver")
    if variables.get("LD_PRELOAD"):
        names = ", ".join(part.rpartition("/")[2] for part in variables["LD_PRELOAD"].split(":"))
        found.append(f"LD_PRELOAD loads {names} into every process")
    if variables.get("VLLM_USE_V1") == "0":
        found.append("VLLM_USE_V1=0: the pinned vLLM has only the V1 engine")
    if variables.get("NCCL_P2P_DISABLE") == "1":
        found.append("NCCL_P2P_DISABLE=1: copies between cards go through the host")
    if variables.get("NCCL_DEBUG", "").upper() in ("INFO", "TRACE"):
        found.append(f"NCCL_DEBUG={variables['NCCL_DEBUG']}: floods the log")
    return found
