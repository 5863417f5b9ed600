"""Peaks of the GPU's memory by phase: while the engine samples, and while the trainer steps; and
memory.json, which sets them beside the engine's own account for ``envcheck calibrate``.

torch keeps one peak; it is read and reset where a rollout begins and where it ends. With KV sleep
torch goes on counting the cache as allocated while nothing is mapped behind it: that much is taken
off the training phase.
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
    from toolkit.train.trainer_seam import TrainerSeam

NAME = "memory.json"


class Statistics(Protocol):
    """What is read of the device, in bytes; peaks are since the last ``reset``."""

    def allocated(self) -> int:
        """Of torch's allocator, now."""

    def peak_allocated(self) -> int:
        """The most that tensors held."""

    def peak_reserved(self) -> int:
        """The most that torch held, its cache included."""

    def asleep(self) -> int:
        """Counted as allocated, and not mapped now."""

    def elsewhere(self) -> int:
        """In use on the card and not torch's: contexts, libraries, other processes."""

    def card(self) -> int:
        """All of the card, as CUDA sees it."""

    def reset(self) -> None:
        """Forget the peaks."""


class CudaStatistics:
    """Of the current CUDA device. What is asleep the engine knows; it is handed in."""

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
    """The largest of every phase so far, in bytes; ``begin`` it when the model is loaded."""

    statistics: Statistics
    account: Mapping[str, int] = field(default_factory=dict)  # the engine's own, by term
    rollout: int = 0
    training: int = 0
    step: int = 0
    on_card: int = 0
    _stepping: bool = field(default=False, repr=False)

    def begin(self) -> None:
        """What has been allocated until now belongs to no phase."""
        self.statistics.reset()
        self._stepping = False

    @contextmanager
    def sampling(self, engine: RolloutEngine) -> Iterator[None]:
        """A rollout; what follows it, up to the next one, is training. Wakes the engine."""
        self.end_training()
        engine.wake()  # gives torch's cache back first: before the reset, or it would count
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
        """The training phase is over; does nothing where none is under way."""
        if not self._stepping:
            return
        now, self._stepping = self.statistics, False
        asleep, peak = now.asleep(), now.peak_allocated()
        self.training = max(self.training, peak - asleep)
        self.step = max(self.step, peak - now.allocated())
        self.on_card = max(self.on_card, now.elsewhere() + now.peak_reserved() - asleep)

    def so_far(self) -> int:
        """The most of torch's allocator until now, in either phase."""
        now = 0
        if self._stepping:
            now = self.statistics.peak_allocated() - self.statistics.asleep()
        return max(self.rollout, self.training, now)

    def terms(self) -> dict[str, int]:
        """By the names of ``toolkit.sizing.calibrate``; only what has been measured."""
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
        """memory.json, once a step was measured. Raises OSError."""
        self.end_training()
        if not self.training:
            return None
        found = {**self.account, **self.terms()}
        return write_file(run_dir / NAME, json.dumps(found, indent=2) + "\n")


def watch(engine: RolloutEngine | None) -> PhasePeaks | None:
    """Peaks for a run on ``engine``; None where nothing can be told by phase: on the CPU, or
    without vLLM.
    """
    llm = getattr(engine, "llm", None)
    if llm is None or not cuda_in_use():
        return None
    from toolkit.engine.engine_memory import asleep_bytes, engine_memory  # noqa: PLC0415 - brings vLLM

    return PhasePeaks(CudaStatistics(asleep_bytes), engine_memory(llm))


def rollout_phase(trainer: TrainerSeam, engine: RolloutEngine) -> AbstractContextManager[None]:
    """Around a rollout of ``trainer``; measured inside ``measured``."""
    peaks: PhasePeaks | None = getattr(trainer, "peaks", None)
    return nullcontext() if peaks is None else peaks.sampling(engine)


@contextmanager
def measured(trainer: TrainerSeam, run_dir: Path) -> Iterator[None]:
    """Around training: memory.json of the first rank, where there is something to tell."""
    engine = getattr(getattr(trainer, "vllm_generation", None), "engine", None)
    trainer.peaks = peaks = watch(engine) if is_first_rank() else None
    if peaks is None:
        yield
        return
    peaks.begin()
    try:
        yield
    finally:  # a step that ran out of memory is worth calibrating most
        if not trainer.lost:
            peaks.write(run_dir)
