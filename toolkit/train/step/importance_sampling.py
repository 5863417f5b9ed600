"""Measure the difference between the sampler's and the trainer's log-probabilities, and compute the
importance weights that correct for this difference.

The trainer's log-probabilities must be those of the policy that sampled the batch. TRL 1.16 runs an
extra forward pass over every batch to compute them. If each generation is used for only one
optimizer step and there is no dropout, the forward pass of training computes the same numbers. Then
the extra pass is skipped, and the weights are computed from the forward pass of training.

The formulas are those of TRL's modes (``vllm_importance_sampling_mode``). The modes with one weight
per token are explained at https://fengyao.notion.site/off-policy-rl. tests/contract checks that the
weights are equal with and without the extra pass.

In this module, a *gap* is the absolute difference of the two log-probabilities of a token.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import torch

from toolkit.base.errors import ToolkitWarning
from toolkit.config.sampling_keywords import unreproduced_keywords
from toolkit.train.process_control import is_first_rank
from toolkit.train.rollout.sampler import sampler_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from toolkit.train.trainer_seam import TrainerSeam


class Disagreement:
    """Running totals of gaps and importance weights over the micro-batches of a logging window.

    The totals stay on the device, so that host and device synchronise only once per window.
    """

    def __init__(self) -> None:
        self.sums: torch.Tensor | None = None  # (4): gap sum, gap count, ratio sum, ratio count
        self.extremes: torch.Tensor | None = None  # (3): largest gap, largest ratio, largest -ratio

    def add(self, gap: torch.Tensor, ratio: torch.Tensor | None) -> None:
        """Add the values of a micro-batch.

        ``gap`` is |engine - trainer| in nats, one-dimensional, with one value per scored token.
        ``ratio`` has the importance weights, one-dimensional, or is None.
        """
        ratio = gap.new_empty(0) if ratio is None else ratio
        sums = torch.stack(
            [gap.sum(), gap.new_tensor(gap.numel()), ratio.sum(), gap.new_tensor(ratio.numel())]
        )
        least = gap.new_tensor([-math.inf])  # so that an empty tensor has a maximum too
        extremes = torch.stack([torch.cat([x, least]).max() for x in (gap, ratio, -ratio)])
        if self.sums is None or self.extremes is None:
            self.sums, self.extremes = sums.double(), extremes
        else:
            self.sums, self.extremes = self.sums + sums, torch.maximum(self.extremes, extremes)

    def pop_metrics(self, accelerator: Any) -> dict[str, float]:
        """Return the metrics of the logging window over all ranks, and reset the totals.

        If importance weights were used, the metrics include those that TRL itself would log. All
        ranks must call this method together.
        """
        if self.sums is None or self.extremes is None:
            return {}
        sums = accelerator.gather(self.sums.unsqueeze(0)).sum(dim=0).tolist()
        extremes = accelerator.gather(self.extremes.unsqueeze(0)).amax(dim=0).tolist()
        self.sums = self.extremes = None
        mean, largest = sums[0] / max(sums[1], 1), max(extremes[0], 0.0)
        metrics = {"sampling/logp_gap_mean": mean, "sampling/logp_gap_max": largest}
        if sums[3]:
            metrics |= {
                "sampling/sampling_logp_difference/mean": mean,
                "sampling/sampling_logp_difference/max": largest,
                "sampling/importance_sampling_ratio/min": -extremes[2],
                "sampling/importance_sampling_ratio/mean": sums[2] / sums[3],
                "sampling/importance_sampling_ratio/max": extremes[1],
            }
        return metrics


def loss_mask(inputs: Mapping[str, Any]) -> torch.Tensor:
    """The mask (B, T) of tokens that the loss uses: 1 for tokens that the model itself sampled."""
    mask: torch.Tensor = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if inputs.get("tool_mask") is not None else mask


def token_gaps(
    logps: torch.Tensor, inputs: Mapping[str, Any], counted: torch.Tensor | None = None
) -> torch.Tensor:
    """The gap |trainer - engine| in nats for each sampled token, one-dimensional.

    ``logps`` (B, T) are the log-probabilities of the trainer. Tokens that the engine could not
    score are excluded, and so are tokens that are False in ``counted`` (B, T, bool).
    """
    delta: torch.Tensor = (logps - inputs["sampling_per_token_logps"]).abs()
    counted = loss_mask(inputs).bool() if counted is None else counted
    return delta[counted & ~torch.isnan(delta)]


def importance_ratio(
    trainer: TrainerSeam, logps: torch.Tensor, inputs: Mapping[str, Any]
) -> torch.Tensor:
    """The importance weights exp(trainer - engine), truncated or masked as in TRL's four modes.

    The shape is (B, T), or (B, 1) for the sequence modes.
    """
    mode = trainer.vllm_importance_sampling_mode
    difference = (logps - inputs["sampling_per_token_logps"]) * loss_mask(inputs)
    difference = torch.nan_to_num(difference, nan=0.0)
    if mode.startswith("sequence_"):
        difference = difference.sum(dim=-1, keepdim=True)
    ratio = torch.exp(difference)
    low, high = trainer.vllm_importance_sampling_clip_min, trainer.vllm_importance_sampling_clip_max
    if mode.endswith("_truncate"):
        return torch.clamp(ratio, min=low, max=high)
    outside = (ratio < (-math.inf if low is None else low)) | (
        ratio > (math.inf if high is None else high)
    )
    return ratio.masked_fill(outside, 0.0)


def old_logps_are_redundant(trainer: TrainerSeam) -> bool:
    """Whether the forward pass of training computes the same numbers as TRL's extra forward pass,
    which can then be skipped.

    The result is True if importance weights are used, each generation is used for one optimizer
    step, and there is no dropout.
    """
    if not (trainer.use_vllm and trainer.vllm_importance_sampling_correction):
        return False
    generate_every = trainer.args.steps_per_generation * trainer.num_iterations
    if trainer.args.gradient_accumulation_steps % generate_every:
        return False
    return not trainer.model.training or not has_dropout(trainer)


def has_dropout(trainer: TrainerSeam) -> bool:
    """Whether any layer of the trainer's model uses dropout in training."""
    config = getattr(trainer.model, "config", None)
    if getattr(config, "attention_dropout", 0.0):
        return True
    return any(layer.p > 0 for layer in trainer.dropout_layers())


def record_gaps(
    trainer: TrainerSeam,
    logps: torch.Tensor,
    inputs: dict[str, Any],
    skipped_rows: Iterable[int] = (),
) -> None:
    """Record the gaps of one micro-batch: the differences between the log-probabilities of the
    engine and ``logps``, the log-probabilities from the forward pass of training.

    The importance weights, which TRL's loss reads, are added to ``inputs``. ``skipped_rows`` are
    the indices of rows that the forward pass left out. The metrics exclude these rows.
    """
    logps = logps.detach()
    ratio = None
    rows_B = torch.ones(len(logps), dtype=torch.bool, device=logps.device)
    rows_B[sorted(skipped_rows)] = False
    computed = loss_mask(inputs).bool() & rows_B[:, None]
    if trainer.use_vllm and trainer.vllm_importance_sampling_correction:
        ratio = importance_ratio(trainer, logps, inputs)
        inputs["importance_sampling_ratio"] = ratio
        if not trainer.vllm_importance_sampling_mode.startswith("sequence_"):
            ratio = ratio[computed]
        else:
            ratio = ratio[rows_B]
        ratio = ratio.flatten()
    trainer.disagreement.add(token_gaps(logps, inputs, computed), ratio)


def record_old_gaps(trainer: TrainerSeam, inputs: Mapping[str, Any]) -> None:
    """Record the gaps of one micro-batch: the differences between the log-probabilities of the
    engine and the old log-probabilities of the trainer.

    This function is for a batch for which TRL has run its extra forward pass. TRL computed the old
    log-probabilities in that pass when the batch was sampled, possibly some steps ago. Importance
    weights are not recorded here, because TRL itself logs them.
    """
    trainer.disagreement.add(token_gaps(inputs["old_per_token_logps"], inputs), None)


RATIO_METRIC = "sampling/importance_sampling_ratio/mean"
MIN_MEAN_RATIO = 0.1
"""A mean importance weight below this value leaves less than a tenth of the gradient."""


def warn_of_collapse(trainer: TrainerSeam) -> None:
    """Warn once, on the first rank, if the importance weights of a logging window are so small that
    almost nothing of the gradient is left.
    """
    means = trainer.train_metric_values.get(RATIO_METRIC) if trainer.model.training else None
    if not means or trainer.collapse_reported or not is_first_rank():
        return
    mean = sum(means) / len(means)
    if mean >= MIN_MEAN_RATIO:
        return
    trainer.collapse_reported = True
    warnings.warn(
        f"the mean importance weight is {mean:.2g}, so almost nothing of the gradient is left: "
        "the engine samples from a different distribution than the one that is trained. "
        f"{_remedy(trainer)}",
        ToolkitWarning,
        stacklevel=2,
    )


GAP_METRIC = "sampling/logp_gap_mean"
MAX_GAP_FLOAT32, MAX_GAP_16_BIT = 0.02, 0.3
"""The largest mean |engine - trainer| in nats that rounding can explain: the first value in
float32, the second with 16-bit or 4-bit weights. Usual values are 1e-6 in float32, and 0.02 to 0.07
with 16-bit or 4-bit weights.
"""


def warn_of_gap(trainer: TrainerSeam) -> None:
    """Warn once, on the first rank, if the mean gap between the log-probabilities of engine and
    trainer in a logging window is larger than rounding can explain.

    Such a gap means that the completions come from another policy than the trained one, for example
    from the base model without its adapter. There is no warning if ``warn_of_collapse`` has warned.
    There is also none if sampling options or dropout explain the gap (the engine samples without
    dropout).
    """
    means = trainer.train_metric_values.get(GAP_METRIC) if trainer.model.training else None
    if not means or trainer.gap_reported or trainer.collapse_reported:
        return
    engine = getattr(getattr(trainer, "vllm_generation", None), "engine", None)
    is_float32 = getattr(engine, "dtype", None) is torch.float32
    limit = MAX_GAP_FLOAT32 if is_float32 else MAX_GAP_16_BIT
    mean = sum(means) / len(means)
    if mean <= limit or _unapplied_options(trainer) or not trainer.accelerator.is_main_process:
        return
    if has_dropout(trainer):
        return
    trainer.gap_reported = True
    warnings.warn(
        f"{GAP_METRIC} is {mean:.2g} nats, but rounding explains at most {limit:g}: the completions"
        " are not sampled from the policy that is trained. For example, the engine may sample"
        " without the adapter. Stop the run, and report this warning together with the run file."
        " If the gap is this large at the first step already, also start a run with"
        " fast_inference: false and compare the gaps",
        ToolkitWarning,
        stacklevel=2,
    )


def _unapplied_options(trainer: TrainerSeam) -> list[str]:
    """The sampling options of the run that the training pass cannot apply."""
    args = trainer.args
    names = list(
        unreproduced_keywords(args.generation_kwargs or {}, sampler_name(trainer.model, args))
    )
    if args.vllm_structured_outputs_regex is not None:
        names.append("vllm_structured_outputs_regex")
    return names


def _remedy(trainer: TrainerSeam) -> str:
    """The part of the warning that tells the user what to change."""
    if names := _unapplied_options(trainer):
        return f"Remove {', '.join(names)}, which the training pass cannot apply"
    return (
        "Completions may be too old (lower num_iterations or steps_per_generation), or the "
        "log-probabilities of engine and trainer differ too much (see sampling/logp_gap_mean)"
    )
