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

from toolkit.base.process_environment import local_rank

if TYPE_CHECKING:
    from collections.abc import Iterable

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
    """What the second process needs to know. ``folder`` has the checkpoint. ``slot_shapes`` are the
    shapes of the layers with LoRA slots: the number of rows of each slice, and the number of
    columns. ``rank`` is the rank of the slots, and ``dtype`` is the dtype of the model ("auto": as
    in the checkpoint). ``graph_sizes`` and ``max_tokens`` are batch sizes in tokens.
    """

    folder: str
    slot_shapes: list[tuple[tuple[int, ...], int]]
    rank: int
    max_loras: int
    dtype: str
    graph_sizes: list[int]
    max_tokens: int

    @classmethod
    def from_options(
        cls, options: EngineOptions, slot_shapes: Iterable[tuple[tuple[int, ...], int]]
    ) -> KernelJob:
        """Return the job for an engine with ``options``, whose model is a folder."""
        arguments = options.to_vllm("cuda")
        graphs: Any = arguments.get("compilation_config")
        sizes = graphs.get("cudagraph_capture_sizes") if isinstance(graphs, dict) else None
        return cls(
            folder=str(Path(options.model).resolve()),
            slot_shapes=sorted(slot_shapes) if options.enable_lora else [],
            rank=options.max_lora_rank,
            max_loras=arguments.get("max_loras", 1),
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


def send_job(options: EngineOptions, slot_shapes: Iterable[tuple[tuple[int, ...], int]]) -> None:
    """Let the second process compile the kernels for an engine with ``options``. ``slot_shapes``
    are the shapes of the layers with LoRA slots: the number of rows of each slice, and the number
    of columns. If no second process is running, start one.

    With tensor parallelism, the layers of an engine have other shapes, so this does nothing.
    """
    if options.tensor_parallel_size != 1:
        return
    start()
    if _process is not None and _process.stdin is not None and not _process.stdin.closed:
        job = json.dumps(asdict(KernelJob.from_options(options, slot_shapes)))
        with suppress(OSError):  # the second process has ended
            _process.stdin.write(job.encode() + b"\n")


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
