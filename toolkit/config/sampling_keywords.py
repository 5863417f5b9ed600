"""Sampling arguments that the toolkit sets itself, for the rules and for the engine."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

OWNED_KEYWORDS: Mapping[str, str] = MappingProxyType(
    {
        "n": "num_generations says how many completions a prompt has",
        "seed": "each completion has a seed of its own, from the run's",
        "logprobs": "TRL takes the most likely token's for the sampled one's where there are more",
        "detokenize": "tokens are decoded where a stop string needs it",
        "flat_logprobs": "rollouts are read in this layout",
        "output_kind": "rollouts are read when they are whole",
    }
)
"""What ``generation_kwargs`` may not set with vLLM, and why."""
