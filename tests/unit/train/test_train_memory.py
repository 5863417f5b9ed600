"""Memory peaks of each phase. The tests set the statistics of torch and of the card."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from toolkit.sizing.calibrate import MEASURED_TERMS, PEAK_KEYS, calibrate
from toolkit.train.report import memory_peaks
from toolkit.train.report.memory_peaks import PhasePeaks

if TYPE_CHECKING:
    from pathlib import Path

GIB = 1 << 30


@dataclass
class Card:
    """A card of 80 GiB with statistics of torch's allocator, and an engine that can sleep."""

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

    def asleep_bytes(self) -> int:
        return self.sleeping

    def elsewhere(self) -> int:
        return GIB

    def card(self) -> int:
        return 80 * GIB

    def reset(self) -> None:
        self.peak, self.reserved = self.now, self.cached

    def wake(self) -> None:
        if self.sleeping:
            self.cached = self.now  # engine/sleep does this before it maps the cache
        self.woken.append(self.sleeping)
        self.sleeping = 0

    def sleep(self) -> None:
        self.sleeping = self.cache


def steps(card: Card, *, cache: int) -> PhasePeaks:
    """Two steps with weights of 3 GiB, a cache, rollouts of 2 GiB, training of 20 and 30 GiB."""
    peaks = PhasePeaks(card)
    card.take(50 * GIB)
    card.free(50 * GIB)  # loading belongs to no phase
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


def test_a_sleeping_cache_does_not_count_for_the_trainer() -> None:
    card = Card()
    terms = steps(card, cache=60 * GIB).terms()
    assert terms["peak.rollout"] == 65 * GIB
    assert terms["peak.training"] == 33 * GIB  # not 93 GiB: the card has 80 GiB
    assert terms["trainer.step"] == 30 * GIB
    assert terms["card.used"] == 66 * GIB
    assert card.woken == [0, 60 * GIB]


def test_phases_without_a_measurement_have_no_terms() -> None:
    peaks = PhasePeaks(Card())
    peaks.begin()
    peaks.end_training()
    assert peaks.terms() == {}


def test_the_phase_after_a_failed_rollout_is_measured() -> None:
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


ACCOUNT = {"engine.loaded": 3 * GIB, "engine.kv": 60 * GIB}


def test_calibrate_reads_memory_json(tmp_path: Path) -> None:
    """Each written name, except card.used and card.total, is a name that calibrate reads."""
    peaks = steps(Card(), cache=60 * GIB)
    peaks.account = ACCOUNT
    written = peaks.write(tmp_path)
    assert written == tmp_path / "memory.json"
    found = json.loads(written.read_text())
    assert found == {**ACCOUNT, **peaks.terms()}
    assert set(found) - {"card.used", "card.total"} <= {*MEASURED_TERMS, *PEAK_KEYS}
    budget = [{"term": "engine.kv", "bytes": 63 * GIB}, {"term": "engine.weights", "bytes": GIB}]
    predicted = dict.fromkeys(PEAK_KEYS.values(), 40 * GIB) | {"bound_bytes": 70 * GIB}
    sizing = {"budget": budget, "peaks": predicted, "device": {"name": "a card"}}
    (tmp_path / "preflight.json").write_text(json.dumps({"sizing": sizing}))
    rows = {row.term: row for row in calibrate(tmp_path).rows}
    assert rows["engine.kv"].relative_error == pytest.approx(0.05)
    assert rows["peak.rollout"].measured == 65 * GIB
    assert rows["peak.training"].measured == 33 * GIB
    assert rows["peak.torch"].measured == 65 * GIB


def test_the_peak_so_far_is_that_of_the_current_step(tmp_path: Path) -> None:
    card = Card()
    peaks = PhasePeaks(card)
    peaks.begin()
    assert peaks.so_far() == 0
    with peaks.sampling(card):
        card.take(5)
        card.free(5)
    assert peaks.so_far() == 5
    card.take(7)
    assert peaks.so_far() == 7
    assert peaks.write(tmp_path) is not None


def test_without_a_step_nothing_is_written(tmp_path: Path) -> None:
    assert PhasePeaks(Card(), ACCOUNT).write(tmp_path) is None
    assert not (tmp_path / "memory.json").exists()


@pytest.mark.parametrize("engine", [None, SimpleNamespace(), SimpleNamespace(llm=object())])
def test_on_the_cpu_nothing_is_measured(tmp_path: Path, engine: object) -> None:
    trainer = SimpleNamespace(vllm_generation=SimpleNamespace(engine=engine))
    with (
        memory_peaks.measure_memory_peaks(trainer, tmp_path),
        memory_peaks.rollout_phase(trainer, Card()),
    ):
        assert trainer.peaks is None
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_writes_its_measurements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Card()
    monkeypatch.setattr(memory_peaks, "phase_peaks_of", lambda engine: PhasePeaks(card, ACCOUNT))
    trainer = SimpleNamespace(is_run_dir_lost=None)

    def train() -> None:
        with memory_peaks.measure_memory_peaks(trainer, tmp_path):
            with memory_peaks.rollout_phase(trainer, card):
                card.take(GIB)
            card.take(9 * GIB)
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        train()
    found = json.loads((tmp_path / "memory.json").read_text())
    assert found["peak.training"] == 10 * GIB
    assert found["engine.kv"] == ACCOUNT["engine.kv"]
