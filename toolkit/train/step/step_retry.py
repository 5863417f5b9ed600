"""Retry a training step in smaller parts if memory runs out, or skip it if its loss is not
finite.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from toolkit.base.errors import ConfigError, first_line
from toolkit.base.process_environment import rank
from toolkit.engine.oom_agreement import repeatable_phase, watch_peers
from toolkit.engine.oom_backoff import is_out_of_memory
from toolkit.train.checkpointing.state_files import flatten
from toolkit.train.step.importance_sampling import loss_mask
from toolkit.train.step.step_errors import logger, release_memory

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from transformers import PreTrainedModel

    from toolkit.train.trainer_seam import TrainerSeam

MAX_SPLIT = 64
"""The maximum number of parts of a micro-batch. If memory still runs out, the run fails."""


class StepAttempt:
    """One micro-step that may be repeated.

    The object keeps the inputs of the micro-step, and the gradients, metrics and progress from
    before the micro-step. After a failed attempt, the gradients, metrics and progress are restored.
    """

    def __init__(self, trainer: TrainerSeam, model: PreTrainedModel) -> None:
        self.trainer, self.model = trainer, model
        self.inputs: Any = None
        self._gradients = [
            None if p.grad is None else p.grad.clone() for p in trainer.trained_parameters()
        ]
        self._metric_lengths: dict[str, int] = {}
        self._progress: tuple[int, float] | None = None

    def record_inputs(self, inputs: Any) -> None:
        """Record that the rollouts are ready. Everything after this call can be repeated."""
        self.inputs = inputs
        self._metric_lengths = {
            name: len(values) for name, values in self.trainer.train_metric_values.items()
        }
        self._progress = self.trainer.micro_progress
        if self._is_only_replica():
            watch_peers()

    def run(self, step: Callable[[], Any]) -> Any:
        """Run ``step()`` and return its result.

        If memory runs out and a finer split is possible, repeat the step with twice as many parts.
        Processes that share a model (tensor parallelism) repeat the step together.
        """
        while True:
            try:
                with repeatable_phase(), self._without_ddp_sync():
                    if self.inputs is not None and self._is_only_replica():
                        watch_peers()
                    return step()
            except (RuntimeError, MemoryError) as error:
                self._raise_for_replicas(error)
                if not self._can_split(error):
                    raise
                failure = first_line(error)
            self._restore()
            self.trainer.min_parts = 2 * self._part_count()
            logger.warning(
                (
                    "training step: out of memory, the micro-batch is split into %d parts from now "
                    "on (%s)"
                ),
                self.trainer.min_parts,
                failure,
            )

    def _raise_for_replicas(self, error: BaseException) -> None:
        if self.inputs is None or self._is_only_replica() or not is_out_of_memory(error):
            return
        number = self.trainer.accelerator.num_processes
        raise ConfigError(
            f"process {rank()} ran out of memory. The process cannot repeat the step in smaller "
            f"parts, because {number} replicas train together ({first_line(error)})",
            where=f"step {self.trainer.state.global_step + 1}",
            fix="lower runtime.pack_tokens, grpo.per_device_train_batch_size or "
            "grpo.max_completion_length (`envcheck size` shows the memory budget). Then run the "
            "same command again: the run resumes from the last checkpoint",
        ) from error

    def _can_split(self, error: BaseException) -> bool:
        if self.inputs is None or not self._is_only_replica() or not is_out_of_memory(error):
            return False
        rows: int = self.inputs["completion_ids"].shape[0]
        return bool(self._part_count() * 2 <= min(MAX_SPLIT, rows))

    def _is_only_replica(self) -> bool:
        """Whether this replica of the model is the only one.

        A step can be repeated only if there is one replica. Several replicas take part in
        collective calls of TRL and DistributedDataParallel, and one of them cannot repeat a call
        alone.
        """
        return bool(self.trainer.accelerator.num_processes == 1)

    def _without_ddp_sync(self) -> AbstractContextManager[None]:
        """A context manager. If there is one replica, it turns off the synchronization of
        DistributedDataParallel.

        With one replica there is nothing to synchronize. But DistributedDataParallel would raise an
        error in a forward pass that follows an interrupted backward pass.
        """
        no_sync = getattr(self.model, "no_sync", None) if self._is_only_replica() else None
        return nullcontext() if no_sync is None else no_sync()

    def _part_count(self) -> int:
        """The number of parts into which the attempt split the micro-batch."""
        return int(max(self.trainer.min_parts, self.trainer.part_count))

    def _restore(self) -> None:
        trained = self.trainer.trained_parameters()
        for parameter, gradient in zip(trained, self._gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        for name, values in self.trainer.train_metric_values.items():
            del values[self._metric_lengths.get(name, 0) :]
        if self._progress is not None:  # this process may have ended the step before another failed
            self.trainer.micro_progress = self._progress
        release_memory()


def loss_in_parts(
    trainer: TrainerSeam,
    model: PreTrainedModel,
    inputs: dict[str, Any],
    parts: list[torch.Tensor],
    compute_loss: Callable[[Any], Any],
) -> Any:
    """Compute the loss of a micro-batch in ``parts`` (row indices), with one autograd graph at a
    time.

    This function runs the backward passes of all parts except the last. The caller runs the
    backward pass of the returned loss. The value of the returned loss is the loss of the whole
    micro-batch, but its autograd graph is only that of the last part. The metrics of the parts are
    combined.
    """
    weighted_parts = split_inputs(trainer, inputs, parts)
    metrics = PartMetrics(trainer, [loss_mask(piece).sum() for piece, _ in weighted_parts])
    earlier_losses = 0.0
    for part, weight in weighted_parts[:-1]:
        with trainer.accelerator.no_sync(model):  # DDP synchronises ranks only at the last part
            value = compute_loss(part) * weight
            trainer.accelerator.backward(value)
        earlier_losses = earlier_losses + value.detach()
    last, weight = weighted_parts[-1]
    value = compute_loss(last) * weight + earlier_losses
    metrics.merge_parts()
    return value


class PartMetrics:
    """Combines the metrics that TRL records for each part of a micro-batch."""

    def __init__(self, trainer: TrainerSeam, tokens: list[torch.Tensor]) -> None:
        """``tokens`` has one number for each part of the micro-batch: how many tokens of this part
        the loss uses.
        """
        self.metric_values = trainer.metric_values
        self.start_lengths = {name: len(values) for name, values in self.metric_values.items()}
        counts = torch.stack(tokens).double()
        if trainer.accelerator.num_processes > 1:
            counts = trainer.accelerator.reduce(counts, reduction="sum")
        self.weights = (counts / counts.sum().clamp(min=1)).tolist()

    def merge_parts(self) -> None:
        """For each metric, replace the values of the micro-batch's parts by one value.

        A metric that is a minimum gets the smallest value of the parts. A metric that is a maximum
        gets the largest value. All other metrics of TRL are means over tokens, so they get the
        weighted mean of the values.
        """
        for name, values in self.metric_values.items():
            start = self.start_lengths.get(name, 0)
            part_values = values[start:]
            if len(part_values) == len(self.weights):
                values[start:] = [_combine(name, part_values, self.weights)]


def _combine(name: str, values: list[float], weights: list[float]) -> float:
    weighted_values = [(v, w) for v, w in zip(values, weights, strict=True) if not math.isnan(v)]
    if not weighted_values:
        return math.nan
    if name.endswith(("_min", "/min")):
        return min(value for value, _ in weighted_values)
    if name.endswith(("_max", "/max")):
        return max(value for value, _ in weighted_values)
    total = sum(weight for _, weight in weighted_values)
    if total == 0:
        return weighted_values[0][0]
    return sum(value * weight for value, weight in weighted_values) / total


def skip_step(trainer: TrainerSeam, model: PreTrainedModel) -> None:
    """Skip a step whose loss or gradient is not finite. The weights do not change.

    Raises:
        ConfigError: ``max_bad_steps`` such steps have followed each other. The rollouts have
            been saved.
    """
    trainer.bad_steps += 1
    model.zero_grad(set_to_none=True)  # the optimizer skips parameters without a gradient
    step = trainer.state.global_step + 1
    trainer.train_metric_values["skipped"].append(1.0)
    logger.warning(
        ("step %d skipped: loss or gradient is not finite (%d in a row)"),
        step,
        trainer.bad_steps,
    )
    if trainer.bad_steps < trainer.max_bad_steps:
        return
    path = save_batch(trainer, step)
    raise ConfigError(
        f"loss or gradient was not finite for {trainer.bad_steps} steps in a row, up to step "
        f"{step}. The rollouts of this step are in {path}",
        where=f"step {step}",
        fix="check the rewards of the rollouts, and lower grpo.learning_rate or "
        "grpo.max_grad_norm. The last checkpoint has the weights from before these steps",
    )


def save_batch(trainer: TrainerSeam, step: int) -> Path:
    """Save the rollouts of the current step as safetensors in the run folder. Return the path."""
    tensors: dict[str, torch.Tensor] = {}
    flatten(trainer.rollout_buffer, tensors, "rollouts")
    rank = trainer.accelerator.process_index
    path = Path(trainer.args.output_dir) / f"bad-step-{step}-rank-{rank}.safetensors"
    save_file(tensors, str(path))
    return path


def split_inputs(
    trainer: TrainerSeam, inputs: dict[str, Any], parts: list[torch.Tensor]
) -> list[tuple[Any, float]]:
    """Split ``inputs`` into ``parts`` along the batch. Return (inputs, weight) for each part.

    The sum of the weighted losses of all parts has the gradient of the whole micro-batch. The
    weight depends on the loss type:

    - grpo, sapo, dr_grpo and luspo average over sequences. The weight is the share of rows.
    - bnpo averages over the tokens of the micro-batch. The weight is the share of tokens.
    - dapo, cispo and vespo divide by a number that is the same for every part. The weight is 1.

    Raises:
        RuntimeError: an option needs the whole micro-batch at once.
    """
    needs_whole_batch = trainer.top_entropy_quantile < 1.0 or trainer.has_entropy_bonus
    if needs_whole_batch or trainer.aux_loss_enabled or inputs.get("pixel_values") is not None:
        raise RuntimeError(
            "out of memory, and the micro-batch cannot be split: top_entropy_quantile, an entropy "
            "bonus, a router loss or images need the whole micro-batch"
        )
    size = inputs["completion_ids"].shape[0]
    mask = loss_mask(inputs)
    tokens = mask.sum().clamp(min=1.0).item()
    weighted_parts = []
    for part in parts:
        part_inputs = {name: _select_rows(value, part, size) for name, value in inputs.items()}
        weight = len(part) / size
        if trainer.loss_type in ("cispo", "dapo", "vespo"):
            weight = 1.0
        elif trainer.loss_type == "bnpo":
            weight = max(mask[part.to(mask.device)].sum().item(), 1.0) / tokens
        weighted_parts.append((part_inputs, weight))
    return weighted_parts


def _select_rows(value: object, part: torch.Tensor, size: int) -> Any:
    """``value`` with only the rows in ``part``, if ``value`` has one item per row. Other values are
    returned unchanged.
    """
    if isinstance(value, torch.Tensor):
        has_rows = value.ndim and value.shape[0] == size
        return value[part.to(value.device)] if has_rows else value
    if isinstance(value, list) and len(value) == size:
        return [value[number] for number in part.tolist()]
    return value
