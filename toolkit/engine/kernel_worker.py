"""The program of the process that compiles kernels (see ``engine.kernel_process``).

It first compiles the recorded kernels that do not depend on the model. When it knows the engine's
options, it compiles the LoRA kernels and the other recorded kernels, and ends. It must start fast.
So it imports Triton, torch, and only the parts of vLLM that define kernels.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import queue
import shutil
import tempfile
import threading
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.engine.kernel_process import MIN_CORES, KernelJob
from toolkit.engine.lora_tables import find_table, use_table, user_folder
from toolkit.gpu.devices import select_device
from toolkit.gpu.snapshot import take_snapshot
from toolkit.gpu.software import installed_version

if TYPE_CHECKING:
    from collections.abc import Mapping

    from toolkit.gpu.snapshot import NodeSnapshot

NICENESS = 5
"""A lower scheduling priority (``nice``) than that of the process that trains."""
PACKAGES = ("vllm", "triton", "torch", "trl", "liger-kernel")
"""The packages whose kernels are compiled, and those that compile."""
MAX_WAIT_S = 300.0
"""The process ends if it gets no job for this long."""
ANSWER = b"the LoRA kernels are compiled\n"


def main() -> None:
    """Compile the kernels that Triton's cache does not have."""
    os.nice(NICENESS)
    answers = os.dup(1)
    os.dup2(2, 1)  # libraries print to stderr, so that stdout has only the answer
    temporary_folder = tempfile.tempdir = tempfile.mkdtemp(prefix="toolkit-kernels-")
    atexit.register(shutil.rmtree, temporary_folder, ignore_errors=True)
    jobs: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read_jobs, args=(jobs,), daemon=True).start()
    target = find_target(take_snapshot())
    if target is not None:
        worker = Worker(*target)
        worker.compile_common_kernels()
        with suppress(queue.Empty):
            worker.compile_kernels_for(jobs.get(timeout=MAX_WAIT_S), answers)


def find_target(node: NodeSnapshot) -> tuple[str, tuple[int, int]] | None:
    """Return the name and the compute capability of the GPU to compile for. Return None if CUDA
    sees no GPU, or if the container may not use enough CPU time.
    """
    cpu_limit = (node.host.cgroup.value or {}).get("cpu_limit")
    gpu = select_device(node)
    if gpu is None or gpu.capability is None or not gpu.name.value:
        return None
    if cpu_limit is not None and cpu_limit < MIN_CORES:
        return None
    return gpu.name.value, gpu.capability


def _read_jobs(jobs: queue.SimpleQueue[str]) -> None:
    """Put each line of stdin into ``jobs``. End this process when the process that started it has
    ended, which closes stdin.
    """
    with os.fdopen(os.dup(0)) as lines:
        for line in lines:
            jobs.put(line)
    with suppress(Exception):
        atexit._run_exitfuncs()  # removes the temporary files
    os._exit(0)


class Worker:
    """Compiles kernels for the GPU with the name ``card``. ``capability`` is its compute capability
    (major, minor).
    """

    def __init__(self, card: str, capability: tuple[int, int]) -> None:
        self.card = card
        self.capability = capability
        self._is_prepared = False

    def compile_common_kernels(self) -> None:
        """Compile the recorded kernels that do not depend on the model."""
        done = self._done_file("")
        if not done.exists():
            self._compile_recorded({})
            done.touch()

    def compile_kernels_for(self, job_text: str, answers: int) -> None:
        """Compile the kernels for the job in ``job_text`` (JSON). When the LoRA kernels are
        compiled, write a line to the file descriptor ``answers``.
        """
        done = self._done_file(job_text)
        if done.exists():
            return
        job = KernelJob(**json.loads(job_text))
        if job.slot_shapes:
            self._prepare()
            from toolkit.engine import lora_kernels  # noqa: PLC0415 - imports torch

            lora_kernels.compile_lora_kernels(lora_kernels.slots_of_job(job))
        os.write(answers, ANSWER)
        from toolkit.engine.kernel_records import read_sizes  # noqa: PLC0415 - imports triton

        self._compile_recorded(read_sizes(Path(job.folder)))
        done.touch()

    def _compile_recorded(self, sizes: Mapping[str, int]) -> None:
        self._prepare()
        from toolkit.engine.kernel_records import compile_recorded_kernels  # noqa: PLC0415

        compile_recorded_kernels(sizes)

    def _prepare(self) -> None:
        if not self._is_prepared:
            from toolkit.engine.kernel_driver import prepare  # noqa: PLC0415 - imports torch

            prepare(self.card, self.capability)
            use_table(self.card, version("vllm"))
            self._is_prepared = True

    def _done_file(self, job_text: str) -> Path:
        """Return the path of an empty file in Triton's cache. It exists if an earlier process has
        compiled the kernels for the same job, card, table, list of kernels, and versions.
        """
        # These imports take a part of a second.
        from triton import knobs  # noqa: PLC0415

        from toolkit.engine.kernel_records import records_file  # noqa: PLC0415

        files = (find_table(self.card), records_file(version("vllm")))
        facts = [job_text, self.card, user_folder(), *map(installed_version, PACKAGES)]
        facts += [file.read_text() if file and file.is_file() else None for file in files]
        name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
        folder = Path(knobs.cache.dir)
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"toolkit-{name}.done"


if __name__ == "__main__":
    main()
