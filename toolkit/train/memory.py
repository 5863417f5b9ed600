"""Peaks of the GPU's memory by phase: while the engine samples, and while the trainer steps.

torch keeps one peak; it is read and reset where a rollout begins and where it ends. With KV sleep
torch goes on counting the cache as allocated while nothing is mapped behind it: that much is taken
off the training phase.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from toolkit.engine.base import RolloutEngine


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
