"""A training step that may have to be made again in smaller parts, or dropped."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from toolkit.base.errors import ConfigError, first_line
from toolkit.engine.mesh import mesh
from toolkit.engine.oom_backoff import is_out_of_memory
from toolkit.train.checkpointing.state_files import flatten
from toolkit.train.step.importance_sampling import loss_mask
from toolkit.train.step.step_errors import logger, release_memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from toolkit.train.trainer_seam import TrainerSeam

MAX_SPLIT = 64
"""A micro-batch is cut into at most this many parts before memory is given up on."""


class Attempt:
    """One micro-step that may have to be made again: its inputs, and how to undo half of it."""

    def __init__(self, trainer: TrainerSeam, model: Any) -> None:
        self.trainer, self.model = trainer, model
        self.inputs: Any = None
        self._gradients = [None if p.grad is None else p.grad.clone() for p in _trained(model)]
        self._marks: dict[str, int] = {}

    def prepared(self, inputs: Any) -> None:
        """The rollouts are there: what comes now can be made again."""
        self.inputs = inputs
        self._marks = {name: len(found) for name, found in self.trainer.train_metric_values.items()}

    def run(self, step: Callable[[], Any]) -> Any:
        """``step()``, and again with twice the parts while memory runs out and parts are left."""
        while True:
            try:
                return step()
            except (RuntimeError, MemoryError) as error:
                if not self._may_split(error):
                    raise
                failure = first_line(error)
            self._undo()
            self.trainer.least_parts = 2 * self._parts()
            logger.warning(
                "training step: out of memory, the micro-batch is cut in %d from here on (%s)",
                self.trainer.least_parts,
                failure,
            )

    def _may_split(self, error: BaseException) -> bool:
        # Ranks meet in collectives: one of them cannot repeat a step alone.
        alone = self.trainer.accelerator.num_processes == 1 and mesh() is None
        if self.inputs is None or not alone or not is_out_of_memory(error):
            return False
        rows: int = self.inputs["completion_ids"].shape[0]
        return bool(self._parts() * 2 <= min(MAX_SPLIT, rows))

    def _parts(self) -> int:
        """In how many parts the micro-batch was tried."""
        return int(max(self.trainer.least_parts, self.trainer.parts))

    def _undo(self) -> None:
        for parameter, gradient in zip(_trained(self.model), self._gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        for name, found in self.trainer.train_metric_values.items():
            del found[self._marks.get(name, 0) :]
        release_memory()


def loss_in_parts(
    trainer: TrainerSeam,
    model: Any,
    inputs: dict[str, Any],
    parts: list[torch.Tensor],
    loss: Callable[[Any], Any],
) -> Any:
    """The loss of a micro-batch in ``parts`` (numbers of rows), one graph at a time.

    All parts but the last are sent backward here; the caller does so with what is returned, whose
    value is the loss of the whole. Metrics of the parts become those of the whole.
    """
    pieces = split_weights(trainer, inputs, parts)
    metrics = PartMetrics(trainer, [loss_mask(piece).sum() for piece, _ in pieces])
    done = 0.0
    for piece, weight in pieces[:-1]:
        with trainer.accelerator.no_sync(model):  # ranks meet at the last part
            value = loss(piece) * weight
            trainer.accelerator.backward(value)
        done = done + value.detach()
    last, weight = pieces[-1]
    value = loss(last) * weight + done
    metrics.merge()
    return value


class PartMetrics:
    """What TRL notes for each part of a micro-batch, put together at the end."""

    def __init__(self, trainer: TrainerSeam, tokens: list[torch.Tensor]) -> None:
        """``tokens``: how many tokens of each part the loss looks at."""
        self.found = trainer.metric_values
        self.marks = {name: len(values) for name, values in self.found.items()}
        counts = torch.stack(tokens).double()
        if trainer.accelerator.num_processes > 1:
            counts = trainer.accelerator.reduce(counts, reduction="sum")
        self.weights = (counts / counts.sum().clamp(min=1)).tolist()

    def merge(self) -> None:
        """Replace the values of the parts by one: TRL's are means over tokens, except extremes."""
        for name, values in self.found.items():
            mark = self.marks.get(name, 0)
            own = values[mark:]
            if len(own) == len(self.weights):
                values[mark:] = [_together(name, own, self.weights)]


def _together(name: str, values: list[float], weights: list[float]) -> float:
    known = [(v, w) for v, w in zip(values, weights, strict=True) if not math.isnan(v)]
    if not known:
        return math.nan
    if name.endswith(("_min", "/min")):
        return min(value for value, _ in known)
    if name.endswith(("_max", "/max")):
        return max(value for value, _ in known)
    total = sum(weight for _, weight in known)
    if total == 0:
        return known[0][0]
    return sum(value * weight for value, weight in known) / total


def drop_step(trainer: TrainerSeam, model: Any) -> None:
    """Loss or gradient is not a number: leave the weights as they are, count, and stop at the
    limit.

    Raises:
        ConfigError: ``max_bad_steps`` in a row; the rollouts have been saved then.
    """
    trainer.bad_steps += 1
    model.zero_grad(set_to_none=True)  # an optimizer passes over parameters without a gradient
    step = trainer.state.global_step + 1
    trainer.train_metric_values["skipped"].append(1.0)
    logger.warning(
        "step %d: loss or gradient is not finite, skipped (%d in a row)", step, trainer.bad_steps
    )
    if trainer.bad_steps < trainer.max_bad_steps:
        return
    path = save_batch(trainer, step)
    raise ConfigError(
        f"loss or gradient was not finite {trainer.bad_steps} steps in a row, up to step {step};"
        f" the rollouts are in {path}",
        where=f"step {step}",
        fix="lower grpo.learning_rate or grpo.max_grad_norm, look at the rewards in that file; the"
        " last checkpoint has the weights from before these steps",
    )


def save_batch(trainer: TrainerSeam, step: int) -> Path:
    """The rollouts under training, as safetensors in the run folder."""
    tensors: dict[str, torch.Tensor] = {}
    flatten(trainer.rollout_buffer, tensors, "rollouts")
    rank = trainer.accelerator.process_index
    path = Path(trainer.args.output_dir) / f"bad-step-{step}-rank-{rank}.safetensors"
    save_file(tensors, str(path))
    return path


def _trained(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def split_weights(
    trainer: TrainerSeam, inputs: dict[str, Any], parts: list[torch.Tensor]
) -> list[tuple[Any, float]]:
    """``inputs`` cut into ``parts`` along the batch, each with the weight that keeps the gradient.

    The loss types differ in what they average over, and so does the weight of a part: sequences
    (grpo, sapo, dr_grpo, luspo), tokens of the micro-batch (bnpo), or a number that was fixed
    before (dapo, cispo, vespo: weight 1).

    Raises:
        RuntimeError: an option that looks at the whole micro-batch at once cannot be cut.
    """
    whole_batch = trainer.top_entropy_quantile < 1.0 or trainer.has_entropy_bonus
    if whole_batch or trainer.aux_loss_enabled or inputs.get("pixel_values") is not None:
        raise RuntimeError(
            "out of memory, and the micro-batch cannot be cut: top_entropy_quantile, an entropy"
            " bonus, a router loss or images need it whole"
        )
    size = inputs["completion_ids"].shape[0]
    mask = loss_mask(inputs)
    tokens = mask.sum().clamp(min=1.0).item()
    pieces = []
    for part in parts:
        piece = {name: _rows(value, part, size) for name, value in inputs.items()}
        weight = len(part) / size
        if trainer.loss_type in ("cispo", "dapo", "vespo"):
            weight = 1.0
        elif trainer.loss_type == "bnpo":
            weight = max(mask[part.to(mask.device)].sum().item(), 1.0) / tokens
        pieces.append((piece, weight))
    return pieces


def _rows(value: Any, part: torch.Tensor, size: int) -> Any:
    """The rows of what has rows; what belongs to the batch as a whole is passed on."""
    if isinstance(value, torch.Tensor):
        has_rows = value.ndim and value.shape[0] == size
        return value[part.to(value.device)] if has_rows else value
    if isinstance(value, list) and len(value) == size:
        return [value[number] for number in part.tolist()]
    return value
