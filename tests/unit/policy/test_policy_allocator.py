"""Expandable segments are enabled only if all GPUs can map memory by pages. The user's own setting
is kept.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import pytest
import torch

from toolkit.base.process_environment import ALLOCATOR_VARIABLES, EXPANDABLE_SEGMENTS
from toolkit.policy.cuda_allocator import VIRTUAL_MEMORY_ATTRIBUTE, use_expandable_segments


class FakeCudaDriver:
    """The called functions of libcuda. ``error_codes`` has a code for each function that must
    fail.
    """

    def __init__(self, gpu_count: int = 1, supported: int = 1, **error_codes: int) -> None:
        self.gpu_count, self.supported, self.error_codes = gpu_count, supported, error_codes

    def cuInit(self, flags: int) -> int:
        assert flags == 0
        return self.error_codes.get("init", 0)

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self.gpu_count
        return self.error_codes.get("count", 0)

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        device._obj.value = ordinal
        return self.error_codes.get("device", 0)

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        assert attribute == VIRTUAL_MEMORY_ATTRIBUTE
        value._obj.value = self.supported if device.value == self.gpu_count - 1 else 1
        return self.error_codes.get("attribute", 0)


@pytest.fixture(autouse=True)
def unset_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ALLOCATOR_VARIABLES:
        monkeypatch.setenv(name, "")  # monkeypatch restores the original value after the test


def allocator_settings() -> list[str | None]:
    return [os.environ.get(name) for name in ALLOCATOR_VARIABLES]


def test_supported_gpus_get_expandable_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeCudaDriver(gpu_count=2))
    use_expandable_segments()
    assert allocator_settings() == [EXPANDABLE_SEGMENTS, EXPANDABLE_SEGMENTS]


def test_an_allocator_in_use_is_configured_too(monkeypatch: pytest.MonkeyPatch) -> None:
    configured: list[str] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeCudaDriver())
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", configured.append)
    use_expandable_segments()
    assert configured == [EXPANDABLE_SEGMENTS]


@pytest.mark.parametrize(
    "driver",
    [
        FakeCudaDriver(gpu_count=2, supported=0),
        FakeCudaDriver(gpu_count=0),
        FakeCudaDriver(init=100),
        FakeCudaDriver(count=3),
        FakeCudaDriver(device=101),
        FakeCudaDriver(attribute=1),
    ],
    ids=["one of two cannot", "no card", "init", "count", "device", "attribute"],
)
def test_without_support_nothing_is_set(
    monkeypatch: pytest.MonkeyPatch, driver: FakeCudaDriver
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    use_expandable_segments()
    assert allocator_settings() == ["", ""]


def test_without_a_driver_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_not_found(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", raise_not_found)
    use_expandable_segments()
    assert allocator_settings() == ["", ""]


@pytest.mark.parametrize("name", ALLOCATOR_VARIABLES)
def test_the_users_setting_is_kept_and_copied_to_both_variables(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeCudaDriver())
    monkeypatch.setenv(name, "max_split_size_mb:512")
    use_expandable_segments()
    assert allocator_settings() == ["max_split_size_mb:512"] * 2
