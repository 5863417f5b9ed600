"""Start a second process that compiles GPU kernels while this process imports its libraries.

Without a cache, Triton compiles a kernel when it is first launched. The start and the first step of
a run with a 1B model need about 65 variants of kernels, of which 38 are variants of the LoRA
kernels. Their compilation takes 11.5 s (H200), and the imports take longer. The second process
(``engine.kernel_worker``) does not use the GPU. It writes the kernels to Triton's cache, where this
process finds them.

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
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.base.process_environment import local_rank
from toolkit.engine.lora_tables import FOLDER_VARIABLE, user_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from toolkit.engine.engine_options import EngineOptions

SWITCH_VARIABLE = "TOOLKIT_KERNEL_PROCESS"
MIN_CORES = 4
"""With fewer cores, the second process would slow down this one."""
MAX_WAIT_S = 60.0
"""This process does not wait longer for the second one. It then compiles the kernels itself."""
DEVICE_FILES = ("/dev/nvidiactl", "/dev/dxg")
"""A machine with an NVIDIA GPU has one of these files (the second one in WSL)."""
DEFAULT_MAX_TOKENS = 16384
"""The largest batch in tokens that is assumed if the options leave it to vLLM. vLLM 0.25.1 uses
8192 or 16384, which need the same variants of the kernels.
"""


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


@dataclass
class _Child:
    """The second process. ``has_job`` says whether it got a job. ``owes_answer`` says whether the
    job has LoRA kernels, and this process has not waited for them yet.
    """

    process: subprocess.Popen[bytes]
    has_job: bool = False
    owes_answer: bool = False

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def close_pipes(self) -> None:
        """Close stdin and stdout. The second process then ends."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def send(self, job: KernelJob) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
        self.has_job = True
        self.owes_answer = bool(job.slot_shapes)


_child: _Child | None = None


def start() -> None:
    """Start the second process, if it can help and none is running. Call this as early as possible.
    The second process then compiles the kernels that do not depend on the model.
    """
    global _child
    if _child is not None:
        if _child.is_running:
            return
        _child.close_pipes()
        _child = None
    if not _can_help():
        return
    # If the process cannot be started, the kernels are compiled when they are launched.
    with suppress(OSError):
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "toolkit.engine.kernel_worker"],
            env=_child_environment(),
            stdin=subprocess.PIPE,  # closed when this process ends, so that the other one ends too
            stdout=subprocess.PIPE,  # one line, when the LoRA kernels are compiled
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )
        # Without this, the ended process would stay in the process table as a zombie.
        threading.Thread(target=process.wait, name="kernel-process", daemon=True).start()
        _child = _Child(process)


def send_job(
    options: EngineOptions, slot_shapes: Callable[[], Iterable[tuple[tuple[int, ...], int]]]
) -> None:
    """Let the second process compile the kernels for an engine with ``options``. ``slot_shapes``
    returns the shapes of the layers with LoRA slots: the number of rows of each slice, and the
    number of columns. It is called only if the second process needs them. If no second process is
    running, start one. A second process does only one job.

    With tensor parallelism, the layers of an engine have other shapes. Then the second process is
    ended.
    """
    if options.tensor_parallel_size != 1:
        if _child is not None:
            _child.close_pipes()
        return
    # If vLLM is imported already, this process needs the LoRA kernels before a second process has
    # imported its libraries. So this process compiles them itself (``engine.lora_compile``).
    is_early = (_child is not None and _child.is_running) or "vllm" not in sys.modules
    start()
    # The second process only saves time. So no error of it may end the start of the engine.
    with suppress(Exception):
        if _child is not None and not _child.has_job:
            _child.send(KernelJob.from_options(options, slot_shapes() if is_early else ()))


def wait_for_lora_kernels() -> None:
    """If the second process is compiling LoRA kernels, wait until they are compiled, or until it
    has ended.
    """
    if _child is not None and _child.owes_answer and _child.process.stdout is not None:
        _child.owes_answer = False
        answers = select.poll()
        answers.register(_child.process.stdout, select.POLLIN)
        answers.poll(1000 * MAX_WAIT_S)


def _child_environment() -> dict[str, str]:
    """Return the environment of the second process. It imports the same package ``toolkit``, and
    chooses its own table of LoRA kernels.
    """
    package_folder = str(Path(__file__).parents[2])
    python_path = os.pathsep.join(filter(None, (package_folder, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": python_path}
    if user_folder() is None:
        environment.pop(FOLDER_VARIABLE, None)
    return environment


def _can_help() -> bool:
    """Whether this machine has a GPU and cores to spare, and the user allows a second process. If
    several processes train on this node, only the first one starts a second process. The others
    compile the LoRA kernels themselves.
    """
    return (
        any(os.path.exists(path) for path in DEVICE_FILES)
        and os.environ.get(SWITCH_VARIABLE) != "off"
        and local_rank() == 0
        and len(os.sched_getaffinity(0)) >= MIN_CORES
    )
