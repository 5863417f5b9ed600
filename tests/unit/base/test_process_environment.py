"""The world size and the ranks are read from the variables that a launcher sets. An invalid
variable is an InputError.
"""

from __future__ import annotations

import pytest

from toolkit.base import process_environment as environment
from toolkit.base.errors import InputError


def test_the_variables_of_torchrun_are_read() -> None:
    job = {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "RANK": "5", "LOCAL_RANK": "1"}
    assert (environment.world_size(job), environment.local_world_size(job)) == (
        8,
        4,
    )
    assert (environment.rank(job), environment.local_rank(job)) == (5, 1)
    assert environment.local_world_size({"WORLD_SIZE": "2"}) == 2


@pytest.mark.parametrize("variables", [{}, {"WORLD_SIZE": "", "RANK": ""}])
def test_without_variables_the_world_size_is_1(variables: dict[str, str]) -> None:
    assert environment.world_size(variables) == environment.local_world_size(variables) == 1
    assert environment.rank(variables) == environment.local_rank(variables) == 0


@pytest.mark.parametrize("value", ["many", "0", "-1", "1.5", "99999999"])
def test_an_invalid_number_of_processes_is_refused(value: str) -> None:
    for count in (environment.world_size, environment.local_world_size):
        with pytest.raises(InputError, match=f"WORLD_SIZE={value} must be a whole number"):
            count({"WORLD_SIZE": value})
