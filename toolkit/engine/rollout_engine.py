"""Define the interface of a sampler for training, and check that vLLM is installed. This module
imports neither torch nor vLLM.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from toolkit.config.sampling_keywords import Engine as SamplerName
    from toolkit.engine.rollout_request import Rollout, Sampling


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples from the policy that is trained. The vLLM engine and Hugging Face generation
    implement this interface.
    """

    sampler_name: SamplerName
    """The library whose names of sampling options and order of sampling steps the engine uses."""

    def publish(self, peft_model: Any, name: str = "default") -> None:
        """Publish the current values of adapter ``name`` of ``peft_model``; the next ``generate``
        samples from it.
        """

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seed: int,
        adapter: bool = True,
        rows: Sequence[int] | None = None,
    ) -> Rollout:
        """Sample ``sampling.n`` completions of each prompt (token ids). The same seed, prompts and
        policy give the same completions.

        If the call is part of a batch, ``rows`` has the index in the batch of each prompt's first
        completion. A completion depends only on the seed and its row, not on the rest of the call.
        None means 0, n, 2n and so on.
        """

    def sleep(self) -> None:
        """Free memory that only sampling needs; the weights stay. Does nothing if there is no such
        memory.
        """

    def wake(self) -> None:
        """Allocate the memory that ``sleep`` freed; called before the next ``generate``."""

    def close(self) -> None:
        """Release the engine and its memory. A second call does nothing."""


def vllm_available() -> bool:
    """True if vLLM can be imported here. The check does not import it."""
    return find_spec("vllm") is not None
