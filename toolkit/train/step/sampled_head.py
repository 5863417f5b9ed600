"""Replace TRL's fused head by a head for the distribution from which the tokens were sampled.

TRL 1.16 calls ``model(..., labels=labels, fused_lm_head=True)`` and reads ``log_probs``,
``entropy`` and ``aux_loss`` (``trl.trainer.utils.add_fused_lm_head``). TRL's head supports only a
temperature. If sampling drops or penalizes tokens, this module replaces the forward method of the
model during such a call. The replacement runs the same backbone, and then the head in chunks of
tokens. The logits of a chunk are computed again in the backward pass, so that no tensor of the
shape (tokens, vocabulary) stays in memory.
"""

from __future__ import annotations

import types
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from toolkit.policy.packed_attention import LAYOUT_KEYWORD
from toolkit.policy.tensor_parallel.functions import (
    copy_to_parallel_region,
    max_over_group,
    reduce_from_parallel_region,
)
from toolkit.policy.tensor_parallel.layers import SplitHead, mesh_of
from toolkit.train.rollout import sampler
from toolkit.train.step import kept_set
from toolkit.train.step.kept_set import Distribution, TokenHistory, TokenPositions, TokenScores
from toolkit.train.step.packing import BATCH_KEYWORD, PaddedBatch
from toolkit.train.trainer_seam import unwrapped

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

    from toolkit.train.trainer_seam import TrainerSeam


class HeadOutput(NamedTuple):
    """The fields of ``FusedCausalLMOutput`` that TRL reads.

    ``log_probs`` and ``entropy`` have the shape (B, L - 1), or (1, N) for a pack. They are 0 for
    tokens that are not scored.
    """

    log_probs: torch.Tensor
    entropy: torch.Tensor
    aux_loss: torch.Tensor | None


@contextmanager
def sampled_head_installed(trainer: TrainerSeam, model: PreTrainedModel) -> Iterator[None]:
    """A context manager. In its block, the head of ``model`` computes the distribution that the
    completions were sampled from.

    ``model`` is the policy or the reference, and may be wrapped. If TRL's head already computes
    this distribution, nothing changes.

    For the reference, the same sampling settings are applied to the reference's own logits.
    Therefore the KL term compares the two distributions after truncation and penalties, and is 0 if
    policy and reference are equal. A sampled token always counts as kept, so that its log-ratio is
    finite even if the reference would drop it.
    """
    distribution = sampler.sampled_distribution(trainer)
    model = unwrapped(trainer, model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if distribution.is_plain and mesh_of(base) is None:
        yield
        return
    # TRL may have set its own forward method on the instance, which must be restored.
    has_instance_forward, original_forward = "forward" in vars(base), base.forward

    def forward(
        self: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any
    ) -> Any:
        if not fused_lm_head:
            return original_forward(*args, labels=labels, **kwargs)
        if LAYOUT_KEYWORD in kwargs:
            return _forward_pack(self, distribution, kwargs)
        return _forward_padded(self, distribution, args, kwargs, labels)

    base.forward = types.MethodType(forward, base)
    try:
        yield
    finally:
        if has_instance_forward:
            base.forward = original_forward
        else:
            del base.forward


def _forward_padded(
    model: PreTrainedModel,
    distribution: Distribution,
    args: Any,
    kwargs: dict[str, Any],
    labels: torch.Tensor,
) -> HeadOutput:
    """The forward pass of a padded batch: the backbone at all positions, and the head only at
    positions whose next label is not -100.
    """
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        kwargs.setdefault("output_router_logits", True)
    outputs = model.base_model(*args, **kwargs, use_cache=False)
    hidden_BLH = outputs.last_hidden_state[:, :-1]
    labels = labels[:, 1:].to(hidden_BLH.device)
    is_scored = labels != -100
    rows_N, positions_N = is_scored.nonzero(as_tuple=True)
    history = None
    if distribution.penalizes:
        ids = kwargs["input_ids"].to(hidden_BLH.device)
        real = kwargs["attention_mask"].to(hidden_BLH.device).bool()
        starts_B = is_scored.int().argmax(1) + 1
        history = TokenHistory(ids, real, starts_B, model.get_output_embeddings().weight.shape[0])
    head = ChunkedHead(model, distribution, history)
    scores = head.score(hidden_BLH[is_scored], labels[is_scored], rows_N, positions_N + 1)
    # masked_scatter keeps the result in the autograd graph even if nothing is scored.
    zeros = hidden_BLH.new_zeros(is_scored.shape, dtype=torch.float32)
    logps, entropy = (zeros.masked_scatter(is_scored, part) for part in scores)
    return HeadOutput(logps, entropy, _router_loss(config, outputs, kwargs))


def _forward_pack(
    model: PreTrainedModel, distribution: Distribution, kwargs: dict[str, Any]
) -> HeadOutput:
    """The forward pass of a pack. Each label of a pack is at the position of the token that
    predicts the label, so the labels are not shifted. The results have the shape (1, N).
    """
    labels_1N = kwargs.pop("shift_labels")
    batch: PaddedBatch | None = kwargs.pop(BATCH_KEYWORD, None)
    hidden_1NH = model.base_model(**kwargs, use_cache=False).last_hidden_state
    is_scored = labels_1N != -100
    history = None
    if distribution.penalizes:
        assert batch is not None
        vocabulary = model.get_output_embeddings().weight.shape[0]
        starts_B = torch.full_like(batch.ids_BL[:, 0], batch.ids_BL.shape[1] - batch.width)
        history = TokenHistory(batch.ids_BL, batch.real_BL.bool(), starts_B, vocabulary)
    head = ChunkedHead(model, distribution, history)
    hidden_and_tokens = hidden_1NH[is_scored], labels_1N[is_scored]
    placeholder_M = torch.zeros_like(
        hidden_and_tokens[1]
    )  # a placeholder: rows and places are read only for penalties
    rows_M, positions_M = (
        (placeholder_M, placeholder_M) if batch is None else (batch.rows_M, batch.positions_M)
    )
    scores = head.score(*hidden_and_tokens, rows_M, positions_M)
    zeros = hidden_1NH.new_zeros(is_scored.shape, dtype=torch.float32)
    logps, entropy = (zeros.masked_scatter(is_scored, part) for part in scores)
    return HeadOutput(logps, entropy, None)


class ChunkedHead:
    """Applies the output layer of ``model`` to hidden states, one chunk of tokens at a time.

    ``model`` must not have a PEFT wrapper.
    """

    def __init__(
        self, model: PreTrainedModel, distribution: Distribution, history: TokenHistory | None
    ) -> None:
        self.layer = model.get_output_embeddings()
        self.distribution, self.history = distribution, history
        config = model.config.get_text_config()
        self.scale, self.cap = logit_scale(config), getattr(config, "final_logit_softcapping", None)

    def score(
        self,
        hidden_NH: torch.Tensor,
        tokens_N: torch.Tensor,
        rows_N: torch.Tensor,
        positions_N: torch.Tensor,
    ) -> TokenScores:
        """The result of ``kept_set.score_tokens`` for all tokens. It is differentiable with respect
        to the hidden states and the weights of the head.
        """
        # If the head is split over processes, its number of rows includes padding. Then the size of
        # a chunk is the same in every process.
        rows = getattr(self.layer, "width", self.layer.weight.shape[0])
        size = max(1, kept_set.CHUNK_ELEMENTS // rows)
        parts = [torch.split(part, size) for part in (hidden_NH, tokens_N, rows_N, positions_N)]
        chunk_scores = [
            TokenScores(
                *checkpoint(self._chunk, *chunk, use_reentrant=False, preserve_rng_state=False)
            )
            for chunk in zip(*parts, strict=True)
        ]
        return TokenScores(
            torch.cat([scores.logps for scores in chunk_scores]),
            torch.cat([scores.entropy for scores in chunk_scores]),
        )

    def _chunk(
        self,
        hidden_NH: torch.Tensor,
        tokens_N: torch.Tensor,
        rows_N: torch.Tensor,
        positions_N: torch.Tensor,
    ) -> TokenScores:
        split_head = self.layer if isinstance(self.layer, SplitHead) else None
        logits_NV = (
            self.layer(hidden_NH) if split_head is None else split_head.local_logits(hidden_NH)
        )
        if self.scale != 1:
            logits_NV = logits_NV * self.scale
        if self.cap is not None:
            logits_NV = torch.tanh(logits_NV / self.cap) * self.cap
        if split_head is not None:  # rule TP004 of the config allows only a plain distribution here
            return score_split_vocabulary(
                logits_NV, tokens_N, self.distribution.temperature, split_head
            )
        positions = (
            None if self.history is None else TokenPositions(self.history, rows_N, positions_N)
        )
        return kept_set.score_tokens(logits_NV, tokens_N, self.distribution, positions)


def logit_scale(config: Any) -> float:
    """The factor by which the model scales its logits, from the config keys that TRL 1.16 reads."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        value = getattr(config, name, None)
        if value is not None:
            return float(value)
    value = getattr(config, "logits_scaling", None)
    if value is None:
        return 1.0
    return float(value) if config.model_type == "hyperclovax" else 1 / float(value)


def _router_loss(config: Any, outputs: Any, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The load-balancing loss of a mixture of experts. None if the router loss is not enabled."""
    if not kwargs.get("output_router_logits"):
        return None
    from transformers.models.mixtral.modeling_mixtral import (  # noqa: PLC0415 - rarely needed
        load_balancing_loss_func,
    )

    loss: torch.Tensor = load_balancing_loss_func(
        outputs.router_logits,
        config.num_experts,
        config.num_experts_per_tok,
        kwargs.get("attention_mask"),
    )
    return loss


def score_split_vocabulary(
    logits_NV: torch.Tensor, tokens_N: torch.Tensor, temperature: float, head: SplitHead
) -> TokenScores:
    """The result of ``kept_set.score_tokens`` for a head that is split over processes. The
    distribution has no truncation and no penalties.

    Each process has a part of the vocabulary, and ``logits_NV`` are the logits of this part.
    ``tokens_N`` are ids in the whole vocabulary. The result is the same in all processes. Let l be
    the logits of a position and m the largest of them. With sums over the whole vocabulary:

        log Z = m + log sum exp(l - m),  log p(token) = l(token) - log Z,  entropy = log Z - sum p l

    The processes of the group compute each sum together, and no process ever has the logits of the
    whole vocabulary. Suffixes of tensor names: N tokens, V part of the vocabulary.
    """
    group = head.mesh.group
    logits_NV = logits_NV.float() / temperature
    max_N = max_over_group(logits_NV.amax(-1), group)
    total_N = reduce_from_parallel_region((logits_NV - max_N[:, None]).exp().sum(-1), group)
    log_norm_N = max_N + total_N.log()
    local_tokens_N = tokens_N - head.split.start
    is_local_N = (local_tokens_N >= 0) & (local_tokens_N < logits_NV.shape[1])
    local_logits_N = logits_NV.gather(1, local_tokens_N.where(is_local_N, 0)[:, None])[:, 0]
    token_logits_N = reduce_from_parallel_region(local_logits_N * is_local_N, group)
    probabilities_NV = (logits_NV - copy_to_parallel_region(log_norm_N, group)[:, None]).exp()
    # An excluded token has a logit of minus infinity and a share of 0.
    products_NV = probabilities_NV * logits_NV.clamp(min=torch.finfo(torch.float32).min)
    mean_logits_N = reduce_from_parallel_region(products_NV.sum(-1), group)
    return TokenScores(token_logits_N - log_norm_N, log_norm_N - mean_logits_N)
