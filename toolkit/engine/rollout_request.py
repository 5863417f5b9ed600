"""Define the sampling parameters of a rollout and its result, in TRL's layout. The values are plain
Python, and this module imports neither torch nor vLLM.
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
"""The upper limit of hashed seeds. With this limit, the sum of a hashed seed and a row fits into a
signed 64-bit integer.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Sampling parameters. Names and defaults are those of TRL's GRPOConfig.

    ``top_k`` 0 means no top-k filter. If ``logprobs`` is None, no log-probabilities are returned.
    If it is 0, the log-probabilities of the sampled tokens are returned. If it is k, those of the k
    most likely tokens are returned too. All of them are computed from the distribution that tokens
    are sampled from (after temperature, top-k, top-p, min-p and penalties).

    ``extra`` has the ``generation_kwargs`` of a run file: other sampling arguments of the engine,
    under the engine's names. The values in ``extra`` take precedence over the fields of this class.
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
        """Check ``n``, ``max_tokens`` and the keys of ``extra``. The engine checks the ranges of
        the other fields.

        Raises:
            ConfigValueError: ``n`` or ``max_tokens`` is below 1, or ``extra`` has a key that the
                toolkit sets.
        """
        if self.n < 1 or self.max_tokens < 1:
            raise ConfigValueError(
                f"n={self.n} and max_tokens={self.max_tokens} must both be at least 1",
                where="sampling",
            )
        for name in self.extra:
            if name in OWNED_KEYWORDS:
                raise ConfigValueError(
                    f"the toolkit sets {name!r} itself: {OWNED_KEYWORDS[name]}",
                    where=f"grpo.generation_kwargs.{name}",
                    fix=f"remove {name}",
                )


@dataclass(frozen=True, slots=True)
class Rollout:
    """Completions in the layout of ``trl.generation.vllm_generation.VLLMGeneration.generate`` (TRL
    1.16).

    Each of the four lists has ``len(prompts) * n`` entries, and the n completions of a prompt are
    adjacent. ``logprobs`` and ``logprob_token_ids`` are nested lists [sequence][position][token].
    If ``Sampling.logprobs`` is 0, each position has one token, the sampled token. If it is above 0,
    each position has several tokens, the most likely token first. If it is None, the two lists are
    None. A log-probability that is NaN becomes None.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    logprobs: list[list[list[float | None]]] | None
    logprob_token_ids: list[list[list[int]]] | None

    def as_tuple(self) -> tuple[Any, Any, Any, Any]:
        """Return (prompt_ids, completion_ids, logprobs, logprob_token_ids), the order in which TRL
        unpacks a rollout.
        """
        return self.prompt_ids, self.completion_ids, self.logprobs, self.logprob_token_ids


def request_seed(seed: int, row: int) -> int:
    """Return the seed of the completion in row ``row`` of a batch with the seed ``seed``.

    The result is the hash of ``seed``, plus ``row``. It fits into a signed 64-bit integer. ``seed``
    is hashed so that the seeds of different batches do not overlap.

    vLLM samples the n completions of one request with n consecutive seeds, beginning with the
    request's seed. These are also the seeds of n requests with one completion each, for the rows
    ``row`` to ``row + n - 1``. So the completions of a prompt do not depend on how they are split
    into requests or over ranks.
    """
    digest = hashlib.blake2b(f"{seed}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % SEED_LIMIT + row


def derive_seed(run_seed: int, generation: int, turn: int = 0) -> int:
    """Return the seed of one call of ``generate``. It is computed from the run's seed, the number
    of the generation batch, and the turn (the number of the call in this generation batch).
    """
    digest = hashlib.blake2b(f"{run_seed}|{generation}|{turn}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % SEED_LIMIT


def check_prompts(prompts: Sequence[Sequence[int]], max_tokens: int, max_model_len: int) -> None:
    """Check that no prompt is empty, and that each prompt is shorter than ``max_model_len``, so
    that at least one token can follow.

    Raises:
        ConfigValueError: a prompt is empty or too long. The message names the first such prompt.
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
                    "set `model.max_seq_length` to at least the length of the longest prompt "
                    f"plus {max_tokens} tokens for the completion, or set "
                    "`grpo.max_prompt_length` to a smaller length. (The descriptions of tools are "
                    "part of the prompt, and max_prompt_length does not count them.)"
                ),
            )
