"""Define the request to a sampler and its result, in TRL's layout, as plain values without torch or
vLLM.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from toolkit.base.errors import ConfigValueError
from toolkit.config.sampling_keywords import OWNED_KEYWORDS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SEED_LIMIT = 2**62
"""Upper limit of a batch's seed, so that seed plus row stays within a signed 64-bit integer.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Sampling parameters. Names and defaults are those of TRL's GRPOConfig.

    ``top_k`` 0 means off. ``logprobs``: None requests none, 0 those of the sampled tokens, k also
    those of the k most likely tokens. They belong to the distribution that tokens are sampled from
    (after temperature, top-k, top-p, min-p and penalties). ``extra`` holds ``generation_kwargs``:
    any other sampling argument of the engine under its own name. It takes precedence over the
    fields.
    """

    n: int = 1
    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    structured_outputs_regex: str | None = None
    logprobs: int | None = 0
    extra: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        """Reject values that break the layout; the engine checks ranges.

        Raises:
            ConfigValueError: ``n`` or ``max_tokens`` below 1, or an ``extra`` key that the toolkit
                sets.
        """
        if self.n < 1 or self.max_tokens < 1:
            raise ConfigValueError(
                f"n={self.n} and max_tokens={self.max_tokens} must both be at least 1",
                where="sampling",
            )
        for name in self.extra:
            if name in OWNED_KEYWORDS:
                raise ConfigValueError(
                    f"{name!r} is set by the toolkit: {OWNED_KEYWORDS[name]}",
                    where=f"grpo.generation_kwargs.{name}",
                    fix="leave it out",
                )


@dataclass(frozen=True, slots=True)
class Rollout:
    """Completions in the layout of ``trl.generation.vllm_generation.VLLMGeneration.generate`` (TRL
    1.16).

    The four lists have ``len(prompts) * n`` entries; the n completions of a prompt are adjacent.
    ``logprobs`` and ``logprob_token_ids`` are [sequence][position][rank], the most likely token
    first (with ``logprobs=0`` only the sampled token); both are None if none were requested. A
    log-probability that is NaN becomes None.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    logprobs: list[list[list[float | None]]] | None
    logprob_token_ids: list[list[list[int]]] | None

    def as_tuple(self) -> tuple[Any, Any, Any, Any]:
        """(prompt_ids, completion_ids, logprobs, logprob_token_ids), as TRL unpacks it."""
        return self.prompt_ids, self.completion_ids, self.logprobs, self.logprob_token_ids


def request_seed(seed: int, row: int) -> int:
    """The seed of completion ``row`` of a batch with ``seed``: a hash of ``seed``, so that batches
    do not overlap, plus ``row``.

    vLLM samples the n completions of one request with seeds from this seed to seed + n - 1. These
    are the same as those of n requests with their own rows. So a group may be one request, or split
    over ranks. The result is within a signed 64-bit integer.
    """
    digest = hashlib.blake2b(f"{seed}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % SEED_LIMIT + row


def derive_seed(run_seed: int, step: int, call: int = 0) -> int:
    """The seed of one call of ``generate``, computed from the run's seed, the optimizer step, and
    the number of the call in that step.
    """
    digest = hashlib.blake2b(f"{run_seed}|{step}|{call}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % SEED_LIMIT


def check_prompts(prompts: Sequence[Sequence[int]], max_tokens: int, max_model_len: int) -> None:
    """Raise an error for prompts that are empty, or too long for at least one completion token.

    Raises:
        ConfigValueError: the message names the first such prompt and a fix.
    """
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ConfigValueError(
                f"prompt {index} has no tokens",
                where="rollout",
                fix="remove empty prompts from the data",
            )
        if len(prompt) >= max_model_len:
            raise ConfigValueError(
                f"prompt {index} has {len(prompt)} tokens, but the engine supports "
                f"{max_model_len} tokens for prompt and completion together",
                where="rollout",
                fix=(
                    f"raise model.max_seq_length (prompt + {max_tokens} would fit all),"
                    " or set grpo.max_prompt_length"
                ),
            )
