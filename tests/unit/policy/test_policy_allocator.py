"""Expandable segments are set where a card can map memory by pages, and the user's own setting
stays.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import pytest
import torch

from toolkit.base.process_environment import ALLOCATOR_VARIABLES, EXPANDABLE_SEGMENTS
from toolkit.policy.cuda_allocator import VIRTUAL_MEMORY_ATTRIBUTE, use_expandable_segments


class Driver:
    """libcuda's functions that are called, with a code for each that is to fail."""

    def __init__(self, cards: int = 1, able: int = 1, **failing: int) -> None:
        self.cards, self.able, self.failing = cards, able, failing

    def cuInit(self, flags: int) -> int:
        assert flags == 0
        return self.failing.get("init", 0)

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self.cards
        return self.failing.get("count", 0)

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        device._obj.value = ordinal
        return self.failing.get("device", 0)

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        assert attribute == VIRTUAL_MEMORY_ATTRIBUTE
        value._obj.value = self.able if device.value == self.cards - 1 else 1
        return self.failing.get("attribute", 0)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ALLOCATOR_VARIABLES:
        monkeypatch.setenv(name, "")  # put back afterwards


def settings() -> list[str | None]:
    return [os.environ.get(name) for name in ALLOCATOR_VARIABLES]


def test_a_card_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(cards=2))
    use_expandable_segments()
    assert settings() == [EXPANDABLE_SEGMENTS, EXPANDABLE_SEGMENTS]


def test_an_allocator_at_work_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append)
    use_expandable_segments()
    assert told == [EXPANDABLE_SEGMENTS]


@pytest.mark.parametrize(
    "driver",
    [
        Driver(cards=2, able=0),
        Driver(cards=0),
        Driver(init=100),
        Driver(count=3),
        Driver(device=101),
        Driver(attribute=1),
    ],
    ids=["one of two cannot", "no card", "init", "count", "device", "attribute"],
)
def test_a_card_that_cannot(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    use_expandable_segments()
    assert settings() == ["", ""]


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", absent)
    use_expandable_segments()
    assert settings() == ["", ""]


@pytest.mark.parametrize("name", ALLOCATOR_VARIABLES)
def test_the_users_own_stays_and_is_told_under_both_names(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    monkeypatch.setenv(name, "max_split_size_mb:512")
    use_expandable_segments()
    assert settings() == ["max_split_size_mb:512"] * 2
