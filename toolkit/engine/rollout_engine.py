"""Define the interface of an engine that samples rollouts, and check whether vLLM is installed.

This module imports neither torch nor vLLM.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from toolkit.config.sampling_keywords import Engine as SamplerName
    from toolkit.engine.rollout_request import Rollout, Sampling


@runtime_checkable
class RolloutEngine(Protocol):
    """The interface of an engine that samples completions from the policy (the model in training).
    The vLLM engine and Hugging Face generation implement it.
    """

    sampler_name: SamplerName
    """The library that the engine samples with. It determines the names of the sampling options and
    the order of the sampling steps.
    """

    def publish(self, peft_model: PreTrainedModel, name: str = "default") -> None:
        """Copy the current values of adapter ``name`` of ``peft_model`` to the engine. Later calls
        of ``generate`` sample with these values.
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

        The row of a completion is its index in the batch. A completion depends only on the seed and
        its row, not on the other prompts of the call. If the call is part of a larger batch,
        ``rows`` has the row of each prompt's first completion. None means 0, n, 2n and so on.
        """

    def sleep(self) -> None:
        """Free the memory that only sampling needs, such as the KV cache. The weights stay in
        memory. Does nothing if the engine has no such memory.
        """

    def wake(self) -> None:
        """Allocate the memory that ``sleep`` freed. Called before the next ``generate``."""

    def close(self) -> None:
        """Release the engine and its memory. A second call does nothing."""


def vllm_available() -> bool:
    """Return True if vLLM is installed. This check does not import vLLM."""
    return find_spec("vllm") is not None
