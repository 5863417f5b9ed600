"""The ranks that vLLM has adapter slots for, as recorded (0.25.1 to 0.31.0; tests/contract holds
them to what is installed).
"""

from __future__ import annotations

from toolkit.config.libraries import RECORDED

LEGAL_RANKS: tuple[int, ...] = RECORDED["lora_ranks"].values


def smallest_rank(rank: int) -> int | None:
    """The smallest of them that holds an adapter of ``rank``; None above the largest."""
    return next((legal for legal in LEGAL_RANKS if legal >= rank), None)
