"""Peak GPU memory by phase (rollout and training), and memory.json, which has these peaks and the
engine's own figures for ``envcheck calibrate``.

torch records one peak, which is read and reset at the beginning and the end of each rollout. With
KV sleep, torch still counts the cache as allocated although its memory is unmapped, so its size is
subtracted from the training phase.
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

NAME = "memory.json"


class Statistics(Protocol):
    """The device readings, in bytes; peaks are since the last ``reset``."""

    def allocated(self) -> int:
        """Bytes that torch's allocator has allocated now."""

    def peak_allocated(self) -> int:
        """Peak bytes of tensors."""

    def peak_reserved(self) -> int:
        """Peak bytes that torch reserved, with its cache."""

    def asleep(self) -> int:
        """Bytes that torch counts as allocated but that are not mapped now."""

    def elsewhere(self) -> int:
        """Bytes in use on the GPU outside torch: contexts, libraries, other processes."""

    def card(self) -> int:
        """Total bytes of the GPU, as CUDA reports it."""

    def reset(self) -> None:
        """Reset the peaks."""


class CudaStatistics:
    """Readings of the current CUDA device. The engine knows the bytes that are asleep; the caller
    passes them.
    """

    def __init__(self, asleep: Callable[[], int]) -> None:
        self.asleep = asleep

    def allocated(self) -> int:
        return int(torch.cuda.memory_allocated())

    def peak_allocated(self) -> int:
        return int(torch.cuda.max_memory_allocated())

    def peak_reserved(self) -> int:
        return int(torch.cuda.max_memory_reserved())

    def elsewhere(self) -> int:
        free, total = torch.cuda.mem_get_info()
        return int(total - free - (torch.cuda.memory_reserved() - self.asleep()))

    def card(self) -> int:
        return int(torch.cuda.mem_get_info()[1])

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats()


@dataclass
class PhasePeaks:
    """The largest values of each phase so far, in bytes. Call ``begin`` when the model is
    loaded.
    """

    statistics: Statistics
    account: Mapping[str, int] = field(default_factory=dict)  # the engine's own figures, by term
    rollout: int = 0
    training: int = 0
    step: int = 0
    on_card: int = 0
    _stepping: bool = field(default=False, repr=False)

    def begin(self) -> None:
        """Start measuring; earlier allocations do not count for any phase."""
        self.statistics.reset()
        self._stepping = False

    @contextmanager
    def sampling(self, engine: RolloutEngine) -> Iterator[None]:
        """Measure a rollout; the time until the next one is the training phase. Wakes the
        engine.
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
            self._stepping = True

    def end_training(self) -> None:
        """End the training phase; does nothing outside one."""
        if not self._stepping:
            return
        now, self._stepping = self.statistics, False
        asleep, peak = now.asleep(), now.peak_allocated()
        self.training = max(self.training, peak - asleep)
        self.step = max(self.step, peak - now.allocated())
        self.on_card = max(self.on_card, now.elsewhere() + now.peak_reserved() - asleep)

    def so_far(self) -> int:
        """The peak of torch's allocator until now, over rollouts and training."""
        now = 0
        if self._stepping:
            now = self.statistics.peak_allocated() - self.statistics.asleep()
        return max(self.rollout, self.training, now)

    def terms(self) -> dict[str, int]:
        """The measured values, by the names of ``toolkit.sizing.calibrate``."""
        found = {
            "peak.rollout": self.rollout,
            "peak.training": self.training,
            "peak.torch": max(self.rollout, self.training),
            "trainer.step": self.step,
            "card.used": self.on_card,
            "card.total": self.statistics.card() if self.on_card else 0,
        }
        return {term: nbytes for term, nbytes in found.items() if nbytes > 0}

    def write(self, run_dir: Path) -> Path | None:
        """Write memory.json if a step was measured. Raises OSError."""
        self.end_training()
        if not self.training:
            return None
        found = {**self.account, **self.terms()}
        return write_file(run_dir / NAME, json.dumps(found, indent=2) + "\n")


def watch(engine: RolloutEngine | None) -> PhasePeaks | None:
    """Peaks for a run on ``engine``; None if phases cannot be measured: on the CPU, or without
    vLLM.
    """
    llm = getattr(engine, "llm", None)
    if llm is None or not cuda_in_use():
        return None
    from toolkit.engine.engine_memory import asleep_bytes, engine_memory  # noqa: PLC0415 - brings vLLM

    return PhasePeaks(CudaStatistics(asleep_bytes), engine_memory(llm))


def rollout_phase(trainer: TrainerSeam, engine: RolloutEngine) -> AbstractContextManager[None]:
    """Wrap a rollout of ``trainer``; it is measured inside ``measured``."""
    peaks: MemoryPeaks | None = getattr(trainer, "peaks", None)
    return nullcontext() if peaks is None else peaks.sampling(engine)


@contextmanager
def measured(trainer: TrainerSeam, run_dir: Path) -> Iterator[None]:
    """Wrap training; the first rank then writes memory.json if anything was measured."""
    engine = getattr(getattr(trainer, "vllm_generation", None), "engine", None)
    trainer.peaks = peaks = watch(engine) if is_first_rank() else None
    if peaks is None:
        yield
        return
    peaks.begin()
    try:
        yield
    finally:  # a step that ran out of memory is the most useful one for calibration
        if not trainer.lost:
            peaks.write(run_dir)
