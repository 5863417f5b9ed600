"""Log-probabilities and entropies where each process holds the logits of a part of the vocabulary.

With m the largest logit of a token and all sums over the group:

    log Z = m + log sum exp(l - m),  log p(token) = l(token) - log Z,  entropy = log Z - sum p l

No process ever has the logits of the whole vocabulary. Suffixes: N tokens, V part of the
vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from toolkit.policy.tensor_parallel.functions import enter_parts, largest, leave_parts
from toolkit.train.step.kept_set import Scored

if TYPE_CHECKING:
    from toolkit.policy.tensor_parallel.layers import SplitHead


def score_parts(
    logits_NV: torch.Tensor, tokens_N: torch.Tensor, temperature: float, head: SplitHead
) -> Scored:
    """``kept_set.score`` of a plain distribution: ``logits_NV`` are this process's, ``tokens_N``
    count over the whole vocabulary. The result is the same in all processes.
    """
    group = head.mesh.group
    logits_NV = logits_NV.float() / temperature
    most_N = largest(logits_NV.amax(-1), group)
    total_N = leave_parts((logits_NV - most_N[:, None]).exp().sum(-1), group)
    norm_N = most_N + total_N.log()
    own_N = tokens_N - head.cut.start
    here_N = (own_N >= 0) & (own_N < logits_NV.shape[1])
    found_N = logits_NV.gather(1, own_N.where(here_N, 0)[:, None])[:, 0]
    token_N = leave_parts(found_N * here_N, group)
    shares_NV = (logits_NV - enter_parts(norm_N, group)[:, None]).exp()
    # An excluded token has a logit of minus infinity and a share of 0.
    products_NV = shares_NV * logits_NV.clamp(min=torch.finfo(torch.float32).min)
    mean_N = leave_parts(products_NV.sum(-1), group)
    return Scored(token_N - norm_N, norm_N - mean_N)
