"""Divisors and multiples, for the fixes of batch rules."""

from __future__ import annotations


def divisors_from(number: int, least: int) -> list[int]:
    """The divisors of ``number`` that are at least ``least``, in ascending order."""
    small = [one for one in range(1, int(number**0.5) + 1) if number % one == 0]
    return sorted({one for low in small for one in (low, number // low) if one >= least})


def nearest_divisor(number: int, wanted: int, least: int = 2) -> int | None:
    """The divisor of ``number`` closest to ``wanted``, the smaller one of two equally close. A
    divisor that leaves more than one group is preferred.
    """
    every = divisors_from(number, least) if 0 < number < 10**9 else []
    found = [one for one in every if one < number] or every
    return min(found, key=lambda one: (abs(one - wanted), one)) if found else None


def multiple_from(step: int, wanted: int) -> int:
    """The smallest multiple of ``step`` that is at least ``wanted``."""
    return -(-wanted // step) * step
