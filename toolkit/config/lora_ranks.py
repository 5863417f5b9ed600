"""The ranks for which vLLM has LoRA slots, as recorded (0.25.1 to 0.31.0; tests/contract compares
them with the installed version).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.config.libraries import RECORDED

if TYPE_CHECKING:
    from collections.abc import Iterable

LEGAL_RANKS: tuple[int, ...] = RECORDED["lora_ranks"].values


def smallest_rank(rank: int, legal: Iterable[int] = LEGAL_RANKS) -> int | None:
    """The smallest of them that is at least ``rank``; None if ``rank`` is above the largest."""
    return min((one for one in legal if one >= rank), default=None)
