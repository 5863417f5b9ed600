"""How torch's CUDA allocator is set from outside: its variables, and what training wants of it."""

from __future__ import annotations

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""torch's variable, and its older name."""
WANTED = "expandable_segments:True"


def expands(setting: str) -> bool:
    """Whether a value of these variables has what is wanted, however it is spelled."""
    return WANTED.lower() in setting.lower().replace(" ", "")
