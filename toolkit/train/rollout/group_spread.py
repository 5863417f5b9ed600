"""The spread of rewards within the groups of a batch: only a group with spread has advantages."""

from __future__ import annotations

from typing import NamedTuple

import torch

EQUAL = 1e-6
"""Rewards of a group that differ by less than this share of the largest (of 1, if all are smaller)
are equal: float32 sums of the same parts differ by that much."""
PER_FUNCTION = "normalize_then_sum"
"""The value of ``multi_objective_aggregation`` with which each function is normalized by itself."""


class GroupSpread(NamedTuple):
    """One value per group of the batch, in the order of the groups."""

    has_signal: list[bool]
    deviation: list[float]
    """Standard deviation of the weighted sum of rewards; 0 without two scored completions. If
    rewards are 0 or 1, the deviation is sqrt(p (1 - p)) with the pass rate p, and largest at p =
    1/2.
    """


def spread_of(
    rewards_BF: torch.Tensor, weights_F: torch.Tensor, group: int, aggregation: str
) -> GroupSpread:
    """The spread of rewards in each group. ``rewards_BF`` has a row per completion, groups next to
    each other, a column per reward function, and NaN where a function does not apply.
    ``aggregation`` is TRL's.
    """
    rewards_BF = rewards_BF.detach().double().cpu()
    weights_F = weights_F.detach().double().cpu()
    total_B = (rewards_BF * weights_F).nansum(dim=1)
    total_B[rewards_BF.isnan().all(dim=1)] = torch.nan
    total_PG = total_B.view(-1, group)
    if aggregation == PER_FUNCTION:
        used_BK = rewards_BF[:, weights_F != 0]
        columns = [used_BK[:, k].view(-1, group) for k in range(used_BK.shape[1])]
    else:
        columns = [total_PG]
    signal_P = torch.zeros(len(total_PG), dtype=torch.bool)
    for column_PG in columns:
        signal_P |= _differs(column_PG)
    count_P = (~total_PG.isnan()).sum(dim=1)
    centred_PG = total_PG - total_PG.nanmean(dim=1, keepdim=True)
    variance_P = centred_PG.square().nansum(dim=1) / count_P.clamp(min=1)
    return GroupSpread(signal_P.tolist(), variance_P.sqrt().tolist())


def _differs(values_PG: torch.Tensor) -> torch.Tensor:
    """Whether the values of each row differ; NaN does not count."""
    missing_PG = values_PG.isnan()
    high_P = values_PG.masked_fill(missing_PG, -torch.inf).amax(dim=1)
    low_P = values_PG.masked_fill(missing_PG, torch.inf).amin(dim=1)
    largest_P = torch.maximum(high_P.abs(), low_P.abs()).clamp(min=1.0)
    return (high_P - low_P > EQUAL * largest_P) & ~missing_PG.all(dim=1)
