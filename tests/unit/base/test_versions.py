"""Versions are compared as PEP 440 says. Driver versions are compared by their numbers."""

from __future__ import annotations

import pytest

from toolkit.base.versions import as_version, satisfies


@pytest.mark.parametrize(
    ("installed", "requirement", "is_satisfied"),
    [
        ("2.11.0", "==2.11.0", True),
        ("2.11.0+cu130", "==2.11.0", True),
        ("2.11.1", "==2.11.0", False),
        ("2.11", "==2.11.0", True),
        ("2.13.9", ">=2.11,<2.14", True),
        ("2.14", ">=2.11,<2.14", False),
        ("5.0.1", "<5.1,>=4.7", True),
        ("1.2.3", "==1.2.*", True),
        ("1.3", "==1.2.*", False),
        ("1.9", "~=1.4", True),
        ("2.0", "~=1.4", False),
        ("1.0", "!=1.0", False),
        ("2.11.0rc1", ">=2.11", False),
        ("2.12.0.dev3+g1a2b", ">=2.11,<2.14", True),
        ("1.0", "nonsense", False),
        ("nonsense", ">=1", False),
    ],
)
def test_the_requirements_of_the_metadata_are_understood(
    installed: str, requirement: str, is_satisfied: bool
) -> None:
    assert satisfies(installed, requirement) is is_satisfied


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("535.9", "535.10"),
        ("580.65.06", "580.159.04"),
        ("570.172.08-server", "580.65.06"),
        ("0.24.9", "0.25.0.dev1+cu130"),
        ("", "1"),
    ],
)
def test_versions_are_ordered_by_their_numbers(older: str, newer: str) -> None:
    assert as_version(older) < as_version(newer)
