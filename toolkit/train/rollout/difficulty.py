"""The curriculum: choose the next prompts by the spread of the rewards that each prompt got in
earlier draws. The spread is the standard deviation of the rewards in the prompt's group.

If the model always or never solves a prompt, all rewards of its group are equal, and GRPO learns
nothing from the group. ``Difficulty.draw_order`` defines the order of the prompts. The order
depends only on the seed and the recorded spreads. Therefore a run that resumes with the same
records chooses the same prompts.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

RECENT_WEIGHT = 0.5
"""The weight of the latest draw in a prompt's recorded spread. The weight of the previous record is
1 - ``RECENT_WEIGHT``.
"""
MIN_WEIGHT = 0.1
"""The smallest weight of a measured prompt, as a share of the mean spread. With this minimum,
prompts without spread are drawn again from time to time, because their spread changes with the
model.
"""


class Difficulty:
    """The recorded reward spread of each row of the dataset. A row with a record is called
    measured.
    """

    def __init__(self, rows: int) -> None:
        self.spread_N = torch.full((rows,), torch.nan, dtype=torch.float64)
        """The recorded spreads, float64. NaN for a row that was not drawn yet."""

    def record(self, rows: Sequence[int], deviations: Sequence[float]) -> None:
        """Update the records of ``rows``. A group of completions was drawn for each row, and
        ``deviations`` has the standard deviation of the rewards of each group. The new record is
        the weighted average of the standard deviation (weight ``RECENT_WEIGHT``) and the old
        record. If a row has no record yet, its record is the standard deviation.
        """
        # The tensor is not changed in place, because a checkpoint may still be writing the old one.
        spread_N = self.spread_N.clone()
        for row, deviation in zip(rows, deviations, strict=True):
            old = spread_N[row].item()
            spread_N[row] = (
                deviation if old != old else (1 - RECENT_WEIGHT) * old + RECENT_WEIGHT * deviation
            )
        self.spread_N = spread_N

    def load(self, spread_N: torch.Tensor) -> None:
        """Restore the records of a checkpoint. Raises ValueError if the records do not belong to
        this dataset.
        """
        if spread_N.shape != self.spread_N.shape or spread_N.dtype != torch.float64:
            raise ValueError(
                "the curriculum records in the checkpoint have the shape "
                f"{tuple(spread_N.shape)}, but the dataset has {len(self.spread_N)} rows"
            )
        recorded = spread_N[~spread_N.isnan()]
        if not (recorded.isfinite() & (recorded >= 0)).all():
            raise ValueError(
                "the checkpoint has a curriculum record whose spread is negative or infinite"
            )
        self.spread_N = spread_N

    def measured_rows(self, rows: Sequence[int]) -> list[int]:
        """Return the rows among ``rows`` that were drawn before."""
        return [row for row in rows if not self.spread_N[row].isnan()]

    def draw_order(self, seed: int, unmeasured_order: Sequence[int], share: float) -> Iterator[int]:
        """Yield all rows of the dataset in the order in which they are drawn.

        Rows that were drawn before (measured rows) and new rows alternate evenly, so that ``share``
        of the rows are measured rows. When all rows of one kind are used, only rows of the other
        kind follow.

        Measured rows are chosen without replacement. The probability of a row is proportional to
        its spread, or to ``MIN_WEIGHT`` times the mean spread if that is larger. New rows come in
        the order ``unmeasured_order``.
        """
        measured = iter(self._rows_by_spread(seed))
        is_measured = (~self.spread_N.isnan()).tolist()
        unmeasured = (row for row in unmeasured_order if not is_measured[row])
        position = 0
        while True:
            position += 1
            draws_measured = int(position * share + 1e-9) > int((position - 1) * share + 1e-9)
            first, second = (measured, unmeasured) if draws_measured else (unmeasured, measured)
            row = next(chain(first, second), None)
            if row is None:
                return
            yield row

    def _rows_by_spread(self, seed: int) -> list[int]:
        """Return the measured rows in a random order. Rows with a larger spread tend to come first.

        The method is weighted sampling without replacement by the key log(u) / weight (Efraimidis
        and Spirakis, 2006).
        """
        rows = (~self.spread_N.isnan()).nonzero(as_tuple=True)[0]
        weights = self.spread_N[rows]
        mean = weights.mean() if len(rows) else torch.tensor(0.0)
        weights = weights.clamp(min=MIN_WEIGHT * mean) if mean > 0 else torch.ones_like(weights)
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand(len(rows), generator=generator, dtype=torch.float64)
        keys = uniform.clamp(min=1e-300).log() / weights
        ordered_rows: list[int] = rows[keys.argsort(descending=True, stable=True)].tolist()
        return ordered_rows

    def mean_spread(self, rows: Sequence[int] | None = None) -> float | None:
        """Return the mean of the recorded reward spreads. If ``rows`` is given, only the records of
        these rows count. Returns None if there is no record.
        """
        spread = self.spread_N if rows is None else self.spread_N[list(rows)]
        recorded = spread[~spread.isnan()]
        return recorded.mean().item() if len(recorded) else None

    @property
    def measured_share(self) -> float:
        """The share of the rows of the dataset that were drawn before."""
        return (~self.spread_N.isnan()).double().mean().item()
