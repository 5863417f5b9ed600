"""Which process of the run this one is, as torchrun says it."""

from __future__ import annotations

import os


def world_size() -> int:
    """Processes of this run, as torchrun says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_rank() -> bool:
    """True for the process that writes."""
    return int(os.environ.get("RANK", "0")) == 0
