"""Compute log-probabilities and entropy of the distribution that was sampled from: after penalties,
temperature, min-p, top-k and top-p.

Truncation (min-p, top-k, top-p) is part of the policy. The sampler draws from the softmax over the
set of kept tokens. A trainer that uses the softmax over the whole vocabulary trains another policy.
With such a trainer, the importance weight of a sequence has an extra factor for each token: the
probability mass of the token's kept set. Therefore the toolkit applies the sampler's steps to the
trainer's logits ("keep sampling mask" in the DeepSeek-V3.2 report, arXiv 2512.02556).

Every function treats tokens independently, so a caller may split N tokens into chunks in any way.
The choice of the kept set has no gradient, but the log-probabilities within the set have one. A
sampled token always counts as kept. If it did not, a rounding difference between sampler and
trainer could drop a sampled token, and the token's log-probability would be infinite.

The steps and their order follow vLLM 0.25.1 and 0.31 (``v1/sample/sampler.py``) and transformers
5.17 (``generation/logits_process.py``).

Suffixes of tensor names: N tokens, V vocabulary, B rows, L tokens of a row (prompt and completion).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

CHUNK_ELEMENTS = 1 << 23
"""The number of logits in one chunk. A float32 copy has 32 MiB, and top-p needs about eight
copies.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """The settings that turn logits into the distribution that is sampled from.

    ``top_k`` 0 or -1, ``top_p`` 1 and ``min_p`` 0 keep all tokens. A repetition penalty of 1 and
    presence and frequency penalties of 0 have no effect. ``min_p_first`` is True for vLLM, which
    applies min-p before top-k and top-p. It is False for transformers, which applies min-p last.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_p_first: bool = True

    @property
    def truncates(self) -> bool:
        """Whether min-p, top-k or top-p may drop tokens."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    @property
    def penalizes(self) -> bool:
        """Whether a penalty makes the logits depend on earlier tokens."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )

    @property
    def is_plain(self) -> bool:
        """Whether the distribution is the softmax of the logits at a temperature, without
        truncation and without penalties.
        """
        return not (self.truncates or self.penalizes)


class TokenScores(NamedTuple):
    """The log-probabilities of N tokens, and the entropies of the distributions that the tokens
    were sampled from. Both are float32 tensors of shape (N).
    """

    logps: torch.Tensor
    entropy: torch.Tensor


class TokenHistory:
    """The tokens of B rows. Penalties need to know which tokens occur before a position.

    ``ids_BL`` (int64) are the tokens. ``real_BL`` (bool) is False on padding. ``starts_B`` (int64)
    is the position where each completion begins. Each row needs memory for two int32 vectors of
    vocabulary size.
    """

    def __init__(
        self, ids_BL: torch.Tensor, real_BL: torch.Tensor, starts_B: torch.Tensor, vocab_size: int
    ) -> None:
        self._ids_BL, self._vocab = ids_BL, vocab_size
        positions_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
        self._drawn_BL = real_BL & (positions_L >= starts_B[:, None])
        self._first_BV = self._first_positions(real_BL)
        self._first_drawn_BV = self._first_positions(self._drawn_BL)

    def _first_positions(self, counted_BL: torch.Tensor) -> torch.Tensor:
        """The first position of each token of the vocabulary in each row, (B, V) int32.

        Only positions that are True in ``counted_BL`` count. The value is L if the token does not
        occur.
        """
        rows, length = self._ids_BL.shape
        positions_L = torch.arange(length, dtype=torch.int32, device=self._ids_BL.device)
        positions_BL = torch.where(counted_BL, positions_L, length).to(torch.int32)
        first_BV = positions_BL.new_full((rows, self._vocab), length)
        return first_BV.scatter_reduce_(1, self._ids_BL, positions_BL, "amin")

    def seen_mask(self, rows_N: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
        """Return an (N, V) bool tensor. Entry (n, v) says whether the token id v occurs in the
        prompt of row ``rows_N[n]``, or in its completion before position ``positions_N[n]``.
        """
        return self._first_BV[rows_N] < positions_N[:, None]

    def drawn_mask(self, rows_N: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
        """Return an (N, V) bool tensor. Entry (n, v) says whether the token id v occurs in the
        completion of row ``rows_N[n]`` before position ``positions_N[n]``.
        """
        return self._first_drawn_BV[rows_N] < positions_N[:, None]

    def drawn_counts(self, rows_N: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
        """Return an (N, V) float32 tensor. Entry (n, v) says how often the token id v occurs in
        the completion of row ``rows_N[n]`` before position ``positions_N[n]``.
        """
        positions_L = torch.arange(self._ids_BL.shape[1], device=positions_N.device)
        counted_NL = self._drawn_BL[rows_N] & (positions_L < positions_N[:, None])
        counts_NV = torch.zeros(len(rows_N), self._vocab, device=positions_N.device)
        return counts_NV.scatter_add_(1, self._ids_BL[rows_N], counted_NL.float())


class TokenPositions(NamedTuple):
    """The locations of N scored tokens: their rows ``rows_N`` in ``history``, and their
    positions ``positions_N`` in these rows.
    """

    history: TokenHistory
    rows_N: torch.Tensor
    positions_N: torch.Tensor


def score_tokens(
    logits_NV: torch.Tensor,
    tokens_N: torch.Tensor,
    distribution: Distribution,
    positions: TokenPositions | None = None,
) -> TokenScores:
    """The log-probabilities of ``tokens_N`` (int64) and the entropies, differentiable with respect
    to the logits.

    ``logits_NV`` are the logits of the model in any float dtype. The computation is in float32.
    ``positions`` is needed only for penalties.

    Raises:
        ValueError: the distribution has penalties, but ``positions`` is None.
    """
    logits_NV = logits_NV.float()
    if distribution.penalizes:
        if positions is None:
            raise ValueError("penalties depend on earlier tokens: pass ``positions``")
        logits_NV = apply_penalties(logits_NV, distribution, positions)
    if distribution.temperature != 1:
        logits_NV = logits_NV / distribution.temperature
    if distribution.truncates:
        dropped_NV = ~kept_mask(logits_NV.detach(), distribution)
        dropped_NV.scatter_(1, tokens_N[:, None], False)
        logits_NV = logits_NV.masked_fill(dropped_NV, -torch.inf)
    logps_NV = torch.log_softmax(logits_NV, -1)
    logps_N = logps_NV.gather(1, tokens_N[:, None])[:, 0]
    # For dropped tokens, p log p would be 0 times -inf, which is NaN. So log p is set to 0.
    finite_NV = logps_NV.masked_fill(logps_NV.detach() == -torch.inf, 0.0)
    return TokenScores(logps_N, -(torch.exp(logps_NV) * finite_NV).sum(-1))


def apply_penalties(
    logits_NV: torch.Tensor, distribution: Distribution, positions: TokenPositions
) -> torch.Tensor:
    """The logits after the repetition, frequency and presence penalties, in vLLM's order.

    transformers has only the repetition penalty.
    """
    history, rows_and_positions = positions.history, (positions.rows_N, positions.positions_N)
    factor = distribution.repetition_penalty
    if factor != 1:
        penalized_NV = torch.where(logits_NV > 0, logits_NV / factor, logits_NV * factor)
        logits_NV = torch.where(history.seen_mask(*rows_and_positions), penalized_NV, logits_NV)
    if distribution.frequency_penalty != 0:
        logits_NV = logits_NV - distribution.frequency_penalty * history.drawn_counts(
            *rows_and_positions
        )
    if distribution.presence_penalty != 0:
        logits_NV = logits_NV - distribution.presence_penalty * history.drawn_mask(
            *rows_and_positions
        )
    return logits_NV


@torch.no_grad()
def kept_mask(logits_NV: torch.Tensor, distribution: Distribution) -> torch.Tensor:
    """Return an (N, V) bool tensor: whether a token of the vocabulary is kept after min-p, top-k
    and top-p in sequence.

    Tokens with the same probability as the last of the top k are kept too, as in vLLM and
    transformers.
    """
    steps: list[tuple[bool, Callable[[torch.Tensor], torch.Tensor]]] = [
        (distribution.top_k > 0, lambda x: _top_k(x, distribution.top_k)),
        (distribution.top_p < 1, lambda x: _top_p(x, distribution.top_p)),
    ]
    min_p = (distribution.min_p > 0, lambda x: _min_p(x, distribution.min_p))
    steps.insert(0 if distribution.min_p_first else len(steps), min_p)
    kept_NV = torch.ones_like(logits_NV, dtype=torch.bool)
    for is_used, step in steps:
        if is_used:
            kept_NV &= step(logits_NV)
            logits_NV = logits_NV.masked_fill(~kept_NV, -torch.inf)
    return kept_NV


def _min_p(logits_NV: torch.Tensor, min_p: float) -> torch.Tensor:
    probabilities_NV = torch.softmax(logits_NV, -1)
    return probabilities_NV >= probabilities_NV.amax(-1, keepdim=True) * min_p


def _top_k(logits_NV: torch.Tensor, top_k: int) -> torch.Tensor:
    top_k = min(top_k, logits_NV.shape[1])
    return logits_NV >= torch.topk(logits_NV, top_k).values[:, -1:]


def _top_p(logits_NV: torch.Tensor, top_p: float) -> torch.Tensor:
    sorted_NV, order_NV = logits_NV.sort(-1)
    below_NV = torch.softmax(sorted_NV, -1).cumsum(-1) <= 1 - top_p
    below_NV[:, -1] = False  # the most likely token is kept
    return torch.ones_like(below_NV).scatter_(1, order_NV, ~below_NV)
