"""What training needs from a thing that samples, and whether vLLM is there. Importable without
torch or vLLM.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from toolkit.config.sampling_keywords import Engine as Reads
    from toolkit.engine.rollout_request import Rollout, Sampling


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples from the policy under training. vLLM (``engine.load``) and Hugging Face generation
    both have this face.
    """

    reads: Reads
    """Whose sampling keywords it reads, and whose order of sampling steps it follows."""

    def publish(self, peft_model: Any, name: str = "default") -> None:
        """Make the adapter ``name`` of ``peft_model``, as it is now, what the next ``generate``
        samples from.
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
        """``sampling.n`` completions of each prompt (token ids). Same seed, same prompts, same
        policy: same completions.

        Where the call is a part of a batch, ``rows`` says which completion of the batch the first
        of each prompt is: a completion is drawn by its seed and its row, whoever draws it with
        what else. None counts 0, n, 2n and so on.
        """

    def sleep(self) -> None:
        """Give memory back that only sampling needs. Weights stay. Without effect where there is
        nothing to give.
        """

    def wake(self) -> None:
        """Take it again; called before the next ``generate``."""

    def close(self) -> None:
        """Release everything; a second call does nothing."""


def vllm_available() -> bool:
    """True if vLLM can be imported here; it is not imported."""
    return find_spec("vllm") is not None
