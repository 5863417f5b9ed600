"""Peaks by phase, from statistics that are set by hand: what torch counts and the card has."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from toolkit.train.memory import PhasePeaks

GIB = 1 << 30


@dataclass
class Card:
    """A device of 80 GiB in the terms of torch's allocator, and an engine whose cache can sleep."""

    now: int = 0
    cached: int = 0
    sleeping: int = 0
    cache: int = 0
    peak: int = 0
    reserved: int = 0
    woken: list[int] = field(default_factory=list)

    def take(self, nbytes: int) -> None:
        self.now += nbytes
        self.cached = max(self.cached, self.now)
        self.peak, self.reserved = max(self.peak, self.now), max(self.reserved, self.cached)

    def free(self, nbytes: int) -> None:
        self.now -= nbytes

    def allocated(self) -> int:
        return self.now

    def peak_allocated(self) -> int:
        return self.peak

    def peak_reserved(self) -> int:
        return self.reserved

    def asleep(self) -> int:
        return self.sleeping

    def elsewhere(self) -> int:
        return GIB

    def card(self) -> int:
        return 80 * GIB

    def reset(self) -> None:
        self.peak, self.reserved = self.now, self.cached

    def wake(self) -> None:
        if self.sleeping:
            self.cached = self.now  # as engine/sleep does before it maps the cache
        self.woken.append(self.sleeping)
        self.sleeping = 0

    def sleep(self) -> None:
        self.sleeping = self.cache


def steps(card: Card, *, cache: int) -> PhasePeaks:
    """Two steps: 3 GiB of weights, a cache, rollouts of 2 and steps of 20 and 30 GiB."""
    peaks = PhasePeaks(card)
    card.take(50 * GIB)
    card.free(50 * GIB)  # loading, which belongs to no phase
    card.cached = 0
    card.cache = cache
    card.take(3 * GIB + cache)
    peaks.begin()
    for step in (20 * GIB, 30 * GIB):
        with peaks.sampling(card):
            card.take(2 * GIB)
            card.free(2 * GIB)
            card.sleep()
        card.take(step)
        card.free(step)
    peaks.end_training()
    return peaks


def test_each_phase_has_its_own_peak() -> None:
    assert steps(Card(), cache=0).terms() == {
        "peak.rollout": 5 * GIB,
        "peak.training": 33 * GIB,
        "peak.torch": 33 * GIB,
        "trainer.step": 30 * GIB,
        "card.used": 34 * GIB,
        "card.total": 80 * GIB,
    }


def test_a_sleeping_cache_is_not_the_trainers() -> None:
    card = Card()
    terms = steps(card, cache=60 * GIB).terms()
    assert terms["peak.rollout"] == 65 * GIB
    assert terms["peak.training"] == 33 * GIB  # not 93 of a card of 80
    assert terms["trainer.step"] == 30 * GIB
    assert terms["card.used"] == 66 * GIB
    assert card.woken == [0, 60 * GIB]


def test_what_is_not_measured_is_not_told() -> None:
    peaks = PhasePeaks(Card())
    peaks.begin()
    peaks.end_training()
    assert peaks.terms() == {}


def test_a_rollout_that_fails_leaves_the_next_phase_to_be_measured() -> None:
    card = Card()
    peaks = PhasePeaks(card)
    peaks.begin()

    def fail() -> None:
        with peaks.sampling(card):
            card.take(GIB)
            card.free(GIB)
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        fail()
    assert peaks.rollout == 0
    card.take(2 * GIB)
    peaks.end_training()
    assert peaks.training == 2 * GIB
