"""Find the architectures that the installed vLLM supports, by reading its registry as text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

REGISTRY = "vllm/model_executor/models/registry.py"


def vllm_supports_any(architectures: Iterable[str]) -> bool | None:
    """Whether vLLM's registry names one of ``architectures``; None if vLLM is not installed. vLLM
    is not imported.

    Raises OSError if the registry cannot be read.
    """
    paths = (Path(entry, REGISTRY) for entry in sys.path if entry)
    registry = next((path for path in paths if path.is_file()), None)
    if registry is None:
        return None
    text = registry.read_text(encoding="utf-8", errors="replace")
    return any(f'"{name}"' in text for name in architectures)
