"""The values that a reward may return: lists, arrays and tensors of numbers, and no others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from rewards_helpers import run

from toolkit.base.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("returned", [None, 1.0, "abcd", {1: 2}, np.float32(1)])
def test_a_value_that_is_not_a_list_is_rejected(tmp_path: Path, returned: Any) -> None:
    with pytest.raises(ConfigError, match="not a list of rewards"):
        run(lambda **kwargs: returned, tmp_path, "fail")


def test_a_coroutine_from_a_function_that_is_not_async_is_rejected(tmp_path: Path) -> None:
    async def later() -> None: ...

    with pytest.raises(ConfigError, match="returned a coroutine, not a list of rewards"):
        run(lambda **kwargs: later(), tmp_path, "fail")


@pytest.mark.parametrize(
    "returned",
    [
        [1, True, None, np.float32(0.5)],
        (1.0, 1, None, 0.5),
        np.array([1.0, 1.0, 0.25, 0.5]),
        torch.tensor([1.0, 1.0, 0.25, 0.5]),
        [torch.tensor(1.0), torch.tensor(1), None, torch.tensor([0.5])],
    ],
)
def test_lists_arrays_and_tensors_are_accepted(tmp_path: Path, returned: Any) -> None:
    _, scores, logged = run(lambda **kwargs: returned, tmp_path, "fail")
    assert [type(score) for score in scores if score is not None] == [float] * (
        4 - scores.count(None)
    )
    assert [scores[0], scores[1], scores[3]] == [1.0, 1.0, 0.5]
    assert logged == {}


def test_a_lone_surrogate_is_escaped() -> None:
    from toolkit.train.rewards.loggable_values import safe_text

    assert safe_text("a\ud800") == "a\\ud800"
    assert safe_text("\ud800" * 20_000).isascii()
