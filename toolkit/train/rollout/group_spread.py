"""Measure the spread of the rewards within each group of a batch. In a group without spread all
rewards are equal, so all advantages are 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

EQUAL_TOLERANCE = 1e-6
"""Rewards of a group count as equal if they differ by at most this number times the larger of 1 and
the largest absolute reward. Float32 sums of the same values can differ by this much."""
NORMALIZE_PER_FUNCTION = "normalize_then_sum"
"""The value of TRL's ``multi_objective_aggregation`` with which each reward function is normalized
separately."""


class GroupSpread(NamedTuple):
    """For each group of the batch: whether the group has a training signal (its rewards differ),
    and the standard deviation of its rewards.
    """

    has_signal: list[bool]
    deviation: list[float]
    """The standard deviation of the weighted sum of rewards. 0 with fewer than two scored
    completions. If all rewards are 0 or 1 and the share of ones is p, the standard deviation is
    sqrt(p (1 - p)), which is largest at p = 1/2.
    """


def spread_of(
    rewards_BF: torch.Tensor, weights_F: torch.Tensor, group_size: int, aggregation: str
) -> GroupSpread:
    """Return the spread of the rewards in each group of ``group_size`` completions.

    ``rewards_BF`` has a row per completion and a column per reward function. The completions of a
    group are in consecutive rows. A value is NaN if the function did not score the completion.
    ``aggregation`` is TRL's ``multi_objective_aggregation``.
    """
    rewards_BF = rewards_BF.detach().double().cpu()
    weights_F = weights_F.detach().double().cpu()
    total_B = (rewards_BF * weights_F).nansum(dim=1)
    total_B[rewards_BF.isnan().all(dim=1)] = torch.nan
    total_PG = total_B.view(-1, group_size)
    if aggregation == NORMALIZE_PER_FUNCTION:
        used_BK = rewards_BF[:, weights_F != 0]
        columns = [used_BK[:, k].view(-1, group_size) for k in range(used_BK.shape[1])]
    else:
        columns = [total_PG]
    signal_P = torch.zeros(len(total_PG), dtype=torch.bool)
    for column_PG in columns:
        signal_P |= _rows_with_spread(column_PG)
    count_P = (~total_PG.isnan()).sum(dim=1)
    centred_PG = total_PG - total_PG.nanmean(dim=1, keepdim=True)
    variance_P = centred_PG.square().nansum(dim=1) / count_P.clamp(min=1)
    return GroupSpread(signal_P.tolist(), variance_P.sqrt().tolist())


def _rows_with_spread(values_PG: torch.Tensor) -> torch.Tensor:
    """Return for each row whether its values differ. NaN values are ignored."""
    missing_PG = values_PG.isnan()
    high_P = values_PG.masked_fill(missing_PG, -torch.inf).amax(dim=1)
    low_P = values_PG.masked_fill(missing_PG, torch.inf).amin(dim=1)
    largest_P = torch.maximum(high_P.abs(), low_P.abs()).clamp(min=1.0)
    return (high_P - low_P > EQUAL_TOLERANCE * largest_P) & ~missing_PG.all(dim=1)
