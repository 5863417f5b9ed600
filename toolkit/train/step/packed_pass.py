"""Decide whether packs can be used for a model, and compute the log-probabilities with packs.

A pack is several completions joined into one sequence without padding (``step/packing.py``). The
results have the padded layout that TRL's loss reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from toolkit.engine.oom_backoff import is_out_of_memory
from toolkit.policy import packed_attention
from toolkit.train.step import packing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from toolkit.policy.packed_attention import PackedLayout
    from toolkit.train.step.packing import Row

SUPPORTED_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
"""The layer types in which tokens affect each other only through the attention function."""
# The largest allowed difference from the padded pass, as a share of the difference that leaving out
# the prompts would cause.
_MAX_DIFFERENCE_SHARE = 0.25
_ROUNDING_NATS = 1e-4  # a difference in nats that is always allowed


@dataclass(frozen=True, slots=True)
class LossScope:
    """The part of a batch that the loss needs.

    ``skipped`` are the indices of rows whose loss terms are 0. ``scored_BT`` is False on tokens
    that the loss does not use. If ``scored_BT`` is None, the loss uses all tokens.
    """

    skipped: frozenset[int] = frozenset()
    scored_BT: torch.Tensor | None = None


def base_of(model: PreTrainedModel) -> Any:
    """The causal language model inside wrappers of DDP and PEFT."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def has_router_loss(model: PreTrainedModel) -> bool:
    """Whether the model's config enables a router loss (as TRL 1.16 reads it)."""
    config = base_of(model).config.get_text_config()
    weight = getattr(config, "router_aux_loss_coef", 0.0)
    return hasattr(config, "output_router_logits") and weight != 0.0


def reason_against_packs(model: PreTrainedModel) -> str | None:
    """Why packs cannot be used for this model, according to its class and config. None if packs can
    be used.
    """
    if not isinstance(model, PreTrainedModel):
        return f"{type(model).__name__} is not a transformers model"
    config = model.config.get_text_config()
    attention = str(config._attn_implementation).removeprefix(packed_attention.NAME_PREFIX)
    if attention not in packed_attention.SUPPORTED_FUNCTIONS:
        return f"packs do not support attn_implementation {attention}"
    if not model._can_set_attn_implementation():
        return f"{type(model).__name__} does not use transformers' attention interface"
    unsupported = set(getattr(config, "layer_types", None) or ()) - SUPPORTED_LAYER_TYPES
    if unsupported:
        return f"packs do not support the model's layers of type {', '.join(sorted(unsupported))}"
    return None


def install_packed_attention(model: PreTrainedModel, padded_pass: Callable[..., Any]) -> str | None:
    """Install packed attention on ``model``, and compare its results once with TRL's padded pass
    ``padded_pass``.

    Return the reason why packs cannot be used, or None if packs can be used. ``model`` must not be
    wrapped. The returned value is stored on the model, so that a second call does not compare
    again.
    """
    stored_reason: str | None
    if "toolkit_packed_refusal" in model.__dict__:
        stored_reason = model.__dict__["toolkit_packed_refusal"]
        return stored_reason
    reason = reason_against_packs(model)
    if reason is None:
        config = model.config.get_text_config()
        packed_attention.register_packed_attention()
        model.set_attn_implementation(packed_attention.NAME_PREFIX + config._attn_implementation)
        reason = _difference_from_padded(model, padded_pass)
    model.__dict__["toolkit_packed_refusal"] = reason
    return reason


def _probe_batch(vocabulary: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, int]:
    """A small padded batch for the comparison of the packed and the padded pass: (ids, mask,
    completion width). It has two prompts, the first with two completions.
    """
    prompts, completions, widths = (5, 5, 3), (4, 2, 3), (5, 4)
    ids = torch.zeros(3, sum(widths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    tokens = (torch.arange(100) * 7919 + 13) % vocabulary
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        prompt_start = widths[0] - prompt
        first_prompt_token = 0 if row < 2 else 20
        ids[row, prompt_start : widths[0]] = tokens[
            first_prompt_token : first_prompt_token + prompt
        ]
        first_completion_token = 40 + 10 * row
        ids[row, widths[0] : widths[0] + completion] = tokens[
            first_completion_token : first_completion_token + completion
        ]
        mask[row, prompt_start : widths[0] + completion] = 1
    return ids.to(device), mask.to(device), widths[1]


@torch.no_grad()
def _difference_from_padded(model: PreTrainedModel, padded_pass: Callable[..., Any]) -> str | None:
    """Compare the packed and the padded pass on a small batch. Return a text that says how the
    results differ, or None if they agree.

    A further pass without the prompts gives the limit for the difference. A wrong attention
    function changes the log-probabilities about as much as the missing prompts do. Rounding changes
    them far less. Therefore the limit is a fraction of the change in the pass without the prompts,
    but at least ``_ROUNDING_NATS``.
    """
    was_training = model.training
    model.eval()
    try:
        ids, mask, width = _probe_batch(model.config.get_text_config().vocab_size, model.device)
        rows = packing.read_rows(ids, mask, width)
        scored = mask[:, -width:].bool()
        padded_logps = padded_pass(model, ids, mask, width)[0]
        rows_without_prompt = [row._replace(prompt=row.prompt[-1:]) for row in rows]
        promptless_logps, _ = _logps(model, rows_without_prompt, ids[:, -width:], scored)
        packed_logps, layout = _logps(model, rows, ids[:, -width:], scored)
        window_problem = _missing_windows(model, layout)
    except (TypeError, ValueError, RuntimeError, AttributeError) as problem:
        if is_out_of_memory(problem):
            raise
        return f"the model fails on a pack ({type(problem).__name__}: {problem})"
    finally:
        model.train(was_training)
    difference = float((packed_logps - padded_logps)[scored].abs().max())
    effect = float((promptless_logps - padded_logps)[scored].abs().max())
    if difference > max(_ROUNDING_NATS, _MAX_DIFFERENCE_SHARE * effect):
        return f"log-probabilities of packed and padded batches differ by {difference:.2g} nats"
    return window_problem


def _logps(
    model: PreTrainedModel,
    rows: Sequence[Row],
    completions_BT: torch.Tensor,
    scored_BT: torch.Tensor,
) -> tuple[torch.Tensor, PackedLayout]:
    """The log-probabilities (B, T) from one pack of ``rows``, and the layout of the pack. The
    layout records the sliding windows that the layers passed to the attention function.
    """
    pack = packing.build_pack(rows, completions_BT, scored_BT)
    assert pack is not None
    shape = (completions_BT.shape[0], completions_BT.shape[1])
    logps = packing.scatter_to_padded(packing.forward_pack(model, pack).log_probs, pack, shape)
    return logps, pack.layout


def _missing_windows(model: PreTrainedModel, layout: PackedLayout) -> str | None:
    """Return the reason why packs (rows merged without padding) would ignore a sliding window of
    the model. Return None if packs apply all sliding windows of the model.

    Packs do not use the attention mask. Some layers apply their window only in this mask, and do
    not pass the window to the attention function. Packs ignore the window of such a layer.
    """
    config = model.config.get_text_config()
    layer_types = getattr(config, "layer_types", None)
    if layer_types:
        expected = list(layer_types).count("sliding_attention")
    else:
        is_used = getattr(config, "use_sliding_window", True)
        window = getattr(config, "sliding_window", None)
        expected = config.num_hidden_layers if is_used and window is not None else 0
    passed = sum(window is not None for window in layout.windows.values())
    if passed >= expected:
        return None
    return f"{expected - passed} layers do not pass their sliding window to the attention function"


def score_batch(
    model: PreTrainedModel,
    batch: tuple[torch.Tensor, torch.Tensor, int],
    scope: LossScope,
    max_tokens: int | None,
    *,
    head_replaced: bool = False,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the log-probabilities and the entropies of ``batch``, each (B, T). Both are 0 for
    tokens that are not scored. Return None if no token is scored.

    ``batch`` is (``input_ids``, ``attention_mask``, width of the completions). ``max_tokens`` is
    the maximum number of tokens per pass. If ``max_tokens`` is None, the whole batch is computed in
    one pass, so that a gradient can be computed. ``head_replaced`` must be True if ``sampled_head``
    has replaced the head of the model.
    """
    input_ids, attention_mask, width = batch
    completions = input_ids[:, -width:]
    scored = attention_mask[:, -width:].bool()
    if scope.scored_BT is not None:
        scored = scored & scope.scored_BT.bool()
    rows = [
        row
        for row in packing.read_rows(input_ids, attention_mask, width)
        if row.number not in scope.skipped
    ]
    parts = [rows] if max_tokens is None else packing.split_rows(rows, max_tokens)
    shape = (input_ids.shape[0], width)
    pack_scores: list[tuple[torch.Tensor, torch.Tensor]] = []
    for part in parts:
        pack = packing.build_pack(part, completions, scored)
        if pack is not None:
            output = packing.forward_pack(model, pack, batch if head_replaced else None)
            logps = packing.scatter_to_padded(output.log_probs, pack, shape)
            if output.entropy is None:  # the head of a separate reference model computes none
                pack_scores.append((logps, torch.zeros_like(logps)))
            else:
                pack_scores.append((logps, packing.scatter_to_padded(output.entropy, pack, shape)))
    if not pack_scores:
        return None
    logps, entropies = (torch.stack(values).sum(0) for values in zip(*pack_scores, strict=True))
    return logps, entropies
