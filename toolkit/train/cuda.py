"""Whether this process uses a GPU."""

from __future__ import annotations

import torch


def cuda_in_use() -> bool:
    """True if torch has a CUDA context here. Asking makes none."""
    ready = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # untyped upstream
    return bool(torch.cuda.is_available() and ready)
