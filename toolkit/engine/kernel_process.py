"""Start a second process that compiles GPU kernels while this process imports its libraries.

Without a cache, Triton compiles a kernel when it is first launched. The start and the first step of
a run need about 65 variants of kernels. Their compilation takes 14 s (1B model, H200), and the
imports take longer. The second process (``engine.kernel_worker``) does not use the GPU. It writes
the kernels to Triton's cache, where this process finds them.

The results of a run do not depend on the second process: a kernel that is not in the cache is
compiled when it is launched. With the environment variable TOOLKIT_KERNEL_PROCESS=off, no second
process is started.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.base.hub_cache import cached_model
from toolkit.base.process_environment import local_rank

if TYPE_CHECKING:
    from toolkit.engine.engine_options import EngineOptions

SWITCH_VARIABLE = "TOOLKIT_KERNEL_PROCESS"
MIN_CORES = 4
"""With fewer cores, the second process would slow down this one."""
MAX_WAIT_S = 60.0
"""This process does not wait longer for the second one. It then compiles the kernels itself."""
DEVICE_FILES = ("/dev/nvidiactl", "/dev/dxg")
"""A machine with an NVIDIA GPU has one of these files (the second one in WSL)."""
DEFAULT_MAX_TOKENS = 8192
"""The largest batch in tokens, if the options leave it to vLLM (0.25.1)."""

_process: subprocess.Popen[bytes] | None = None


@dataclass(frozen=True, kw_only=True)
class KernelJob:
    """What the second process needs to know. ``folder`` has the checkpoint. ``target_modules`` are
    the layers with LoRA slots (None: all), ``lora_rank`` is the rank of the slots (None: no LoRA),
    and ``dtype`` is the dtype of the model ("auto": as in the checkpoint). ``graph_sizes`` and
    ``max_tokens`` are batch sizes in tokens.
    """

    folder: str
    lora_rank: int | None
    max_loras: int
    target_modules: list[str] | None
    dtype: str
    graph_sizes: list[int]
    max_tokens: int

    @classmethod
    def from_options(cls, options: EngineOptions) -> KernelJob | None:
        """Return the job for an engine. Return None if the checkpoint is not on this machine."""
        folder = Path(options.model)
        if not folder.is_dir():
            cached = cached_model(options.model, options.revision, os.environ)
            if cached is None:
                return None
            folder = cached
        arguments = options.to_vllm("cuda")
        graphs: Any = arguments.get("compilation_config")
        sizes = graphs.get("cudagraph_capture_sizes") if isinstance(graphs, dict) else None
        return cls(
            folder=str(folder.resolve()),
            lora_rank=arguments.get("max_lora_rank") if options.enable_lora else None,
            max_loras=arguments.get("max_loras", 1),
            target_modules=arguments.get("lora_target_modules"),
            dtype=options.dtype,
            graph_sizes=list(sizes or ()),
            max_tokens=arguments.get("max_num_batched_tokens", DEFAULT_MAX_TOKENS),
        )


def start() -> None:
    """Start the second process, if it can help and none is running. Call this as early as possible.
    The second process then compiles the kernels that do not depend on the model.
    """
    global _process
    if _process is not None:
        if _process.poll() is None:
            return
        _close_pipes(_process)
        _process = None
    if not _can_help():
        return
    package_folder = str(Path(__file__).parents[2])
    python_path = os.pathsep.join(filter(None, (package_folder, os.environ.get("PYTHONPATH"))))
    # If the process cannot be started, the kernels are compiled when they are launched.
    with suppress(OSError):
        _process = subprocess.Popen(
            [sys.executable, "-P", "-m", "toolkit.engine.kernel_worker"],
            env={**os.environ, "PYTHONPATH": python_path},
            stdin=subprocess.PIPE,  # closed when this process ends, so that the other one ends too
            stdout=subprocess.PIPE,  # one line, when the LoRA kernels are compiled
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )


def send_job(options: EngineOptions) -> None:
    """Let the second process compile the kernels for an engine with ``options``. If no second
    process is running, start one.

    Each process of a tensor parallel engine has its own shapes of kernels, and the second process
    knows only the shapes of the checkpoint. So this does nothing for such an engine.
    """
    job = KernelJob.from_options(options) if options.tensor_parallel_size == 1 else None
    if job is None:
        return
    start()
    if _process is not None and _process.stdin is not None and not _process.stdin.closed:
        with suppress(OSError):  # the second process has ended
            _process.stdin.write(json.dumps(asdict(job)).encode() + b"\n")


def wait_for_lora_kernels() -> None:
    """Wait until the second process has compiled the LoRA kernels, or has ended."""
    if _process is not None and _process.stdout is not None and not _process.stdout.closed:
        readable, _, _ = select.select([_process.stdout], [], [], MAX_WAIT_S)
        if readable:
            _process.stdout.readline()


def _close_pipes(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _can_help() -> bool:
    """Whether this machine has a GPU and cores to spare, and the user allows a second process. If
    several processes train on this node, only the first one compiles.
    """
    return (
        any(os.path.exists(path) for path in DEVICE_FILES)
        and os.environ.get(SWITCH_VARIABLE) != "off"
        and local_rank() == 0
        and len(os.sched_getaffinity(0)) >= MIN_CORES
    )
