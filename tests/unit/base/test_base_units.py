"""Bytes, durations and counts are printed in readable units."""

from __future__ import annotations

import pytest

from toolkit.base.formatting import GIB, format_bytes, format_duration, format_parameters, plural


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (12 << 20, "12.0 MiB"),
        (1.5 * GIB, "1.50 GiB"),
        (-3 * GIB, "-3.00 GiB"),
    ],
)
def test_format_bytes(count: float, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.4, "9.4 s"),
        (42, "42 s"),
        (59.6, "1 min 00 s"),
        (187, "3 min 07 s"),
        (7500, "2 h 05 min"),
    ],
)
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_format_counts() -> None:
    assert [plural(count, "GPU") for count in (0, 1, 2)] == ["0 GPUs", "1 GPU", "2 GPUs"]
    assert format_parameters(8_030_261_248) == "8.030 B"
    assert format_parameters(456_789) == "0.46 M"
