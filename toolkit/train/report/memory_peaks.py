"""Measure peak GPU memory by phase (rollout and training), and write memory.json.

memory.json contains these peaks, and the figures that the engine itself reports. ``envcheck
calibrate`` reads memory.json.

torch has a single counter of peak memory. The counter is read and reset at the beginning and the
end of each rollout, so that each phase has its own peak. With KV sleep, the memory of the KV cache
is unmapped during training. But torch still counts this memory as allocated, so it is subtracted
from the training peak.
"""

from __future__ import annotations

import json
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch

from toolkit.base.paths import write_file
from toolkit.policy.machine_facts import cuda_in_use
from toolkit.train.process_control import is_first_rank

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

    from toolkit.engine.rollout_engine import RolloutEngine
    from toolkit.train.trainer_seam import MemoryPeaks, TrainerSeam

MEMORY_FILE = "memory.json"


class Statistics(Protocol):
    """The memory use of a GPU, in bytes. A peak is the largest value since the last ``reset``."""

    def allocated(self) -> int:
        """The bytes that torch's allocator has currently allocated for tensors."""

    def peak_allocated(self) -> int:
        """The peak of the bytes that torch's allocator had allocated for tensors."""

    def peak_reserved(self) -> int:
        """The peak of the bytes that torch's allocator had reserved (tensors and free blocks)."""

    def asleep_bytes(self) -> int:
        """The bytes that are currently unmapped (KV sleep), but that torch counts as allocated."""

    def elsewhere(self) -> int:
        """The bytes on the GPU that are used outside torch: by CUDA contexts, libraries and other
        processes.
        """

    def card(self) -> int:
        """The total memory of the GPU in bytes, as CUDA reports it."""

    def reset(self) -> None:
        """Set the peaks to the current memory use."""


class CudaStatistics:
    """The memory use of the current CUDA device, in bytes.

    The engine provides the function ``asleep_bytes``, because only the engine knows how many bytes
    are unmapped (KV sleep).
    """

    def __init__(self, asleep_bytes: Callable[[], int]) -> None:
        self.asleep_bytes = asleep_bytes

    def allocated(self) -> int:
        return int(torch.cuda.memory_allocated())

    def peak_allocated(self) -> int:
        return int(torch.cuda.max_memory_allocated())

    def peak_reserved(self) -> int:
        return int(torch.cuda.max_memory_reserved())

    def elsewhere(self) -> int:
        free, total = torch.cuda.mem_get_info()
        return int(total - free - (torch.cuda.memory_reserved() - self.asleep_bytes()))

    def card(self) -> int:
        return int(torch.cuda.mem_get_info()[1])

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats()


@dataclass
class PhasePeaks:
    """The memory peaks of a run so far, in bytes. Call ``begin`` after the model is loaded.

    ``rollout`` and ``training`` are the peaks of torch's allocator in the two phases. ``step`` is
    the memory that training needs only temporarily: the peak of a training phase, minus the memory
    that is allocated at the end of the phase. The phase with the largest difference counts.
    ``on_card`` is the peak of the memory use of the GPU, including other processes.
    """

    statistics: Statistics
    account: Mapping[str, int] = field(default_factory=dict)  # the engine's own figures, by term
    rollout: int = 0
    training: int = 0
    step: int = 0
    on_card: int = 0
    _in_training: bool = field(default=False, repr=False)

    def begin(self) -> None:
        """Start to measure memory peaks. Peaks before this call are ignored."""
        self.statistics.reset()
        self._in_training = False

    @contextmanager
    def sampling(self, engine: RolloutEngine) -> Iterator[None]:
        """Wake the engine, and measure the memory peak of the rollout, which is the ``with`` block.

        After the block, a training phase begins. It ends at the next call of this function.
        """
        self.end_training()
        engine.wake()  # frees torch's cache, so it must run before the reset
        self.statistics.reset()
        try:
            yield
            self.rollout = max(self.rollout, self.statistics.peak_allocated())
            used = self.statistics.elsewhere() + self.statistics.peak_reserved()
            self.on_card = max(self.on_card, used)
        finally:
            self.statistics.reset()
            self._in_training = True

    def end_training(self) -> None:
        """End the training phase and record its peaks. Does nothing outside a training phase."""
        if not self._in_training:
            return
        now, self._in_training = self.statistics, False
        asleep, peak = now.asleep_bytes(), now.peak_allocated()
        self.training = max(self.training, peak - asleep)
        self.step = max(self.step, peak - now.allocated())
        self.on_card = max(self.on_card, now.elsewhere() + now.peak_reserved() - asleep)

    def so_far(self) -> int:
        """The peak of torch's allocator since ``begin``, including the current training phase."""
        now = 0
        if self._in_training:
            now = self.statistics.peak_allocated() - self.statistics.asleep_bytes()
        return max(self.rollout, self.training, now)

    def terms(self) -> dict[str, int]:
        """The measured values in bytes, by the names that ``toolkit.sizing.calibrate`` uses."""
        measurements = {
            "peak.rollout": self.rollout,
            "peak.training": self.training,
            "peak.torch": max(self.rollout, self.training),
            "trainer.step": self.step,
            "card.used": self.on_card,
            "card.total": self.statistics.card() if self.on_card else 0,
        }
        return {term: nbytes for term, nbytes in measurements.items() if nbytes > 0}

    def write(self, run_dir: Path) -> Path | None:
        """Write memory.json and return its path. None if no step was measured. Raises OSError."""
        self.end_training()
        if not self.training:
            return None
        measurements = {**self.account, **self.terms()}
        return write_file(run_dir / MEMORY_FILE, json.dumps(measurements, indent=2) + "\n")


def phase_peaks_of(engine: RolloutEngine | None) -> PhasePeaks | None:
    """Return the object that measures the memory peaks of a run with ``engine``. None on the CPU or
    without vLLM, where the phases cannot be measured.
    """
    llm = getattr(engine, "llm", None)
    if llm is None or not cuda_in_use():
        return None
    from toolkit.engine.engine_memory import asleep_bytes, engine_memory  # noqa: PLC0415 - imports vLLM

    return PhasePeaks(CudaStatistics(asleep_bytes), engine_memory(llm))


def rollout_phase(trainer: TrainerSeam, engine: RolloutEngine) -> AbstractContextManager[None]:
    """Return a context manager for a rollout. Inside the context of ``measure_memory_peaks``, it
    measures the memory peak of the rollout. Otherwise, it does nothing.
    """
    peaks: MemoryPeaks | None = getattr(trainer, "peaks", None)
    return nullcontext() if peaks is None else peaks.sampling(engine)


@contextmanager
def measure_memory_peaks(trainer: TrainerSeam, run_dir: Path) -> Iterator[None]:
    """A context manager for training. It measures memory peaks on the first rank.

    At the end, it writes memory.json if at least one step was measured.
    """
    engine = getattr(getattr(trainer, "vllm_generation", None), "engine", None)
    trainer.peaks = peaks = phase_peaks_of(engine) if is_first_rank() else None
    if peaks is None:
        yield
        return
    peaks.begin()
    try:
        yield
    finally:  # also after an out-of-memory error, because the peaks are useful for calibration
        if not trainer.is_run_dir_lost:
            peaks.write(run_dir)
