"""Choose the prompts of a generation, which is one batch of completions that the trainer samples.

TRL's sampler or the curriculum chooses the prompts. With dynamic sampling, groups whose rewards
have no spread are then replaced by groups of further prompts.

The choice depends only on the run seed, the number of the generation and, with the curriculum, the
recorded spreads. Therefore all ranks make the same choice, and a checkpoint stores only the
spreads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from toolkit.base.errors import ConfigValueError
from toolkit.engine.rollout_request import derive_seed
from toolkit.train.rollout.difficulty import Difficulty
from toolkit.train.rollout.dynamic_sampling import Generation

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from toolkit.train.trainer_seam import TrainerSeam

CHOICE_TURN = 1 << 21
"""The seed for the order of prompts is derived like the seed of a completion, with this number in
place of the turn. No turn has this number, so the two kinds of seeds differ.
"""


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Check that the arguments ``arguments`` of a trainer can be used with dynamic sampling and the
    curriculum, if one of the two is on.

    Raises:
        ConfigValueError: an argument cannot be used with dynamic sampling or the curriculum.
    """
    config, rows = arguments["args"], arguments.get("train_dataset")
    enabled = [name for name in ("dynamic_sampling", "curriculum") if _is_enabled(config, name)]
    if not enabled:
        return
    if rows is not None and not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
        raise ConfigValueError(
            f"{enabled[0]}=True reads rows of the dataset by their index, but train_dataset is a "
            "stream without indices",
            where="GRPOConfig",
            fix=f"load the dataset without streaming, or set `{enabled[0]}=False`",
        )
    columns = getattr(rows, "column_names", None) or ()
    clashes = {
        "rollout_func": arguments.get("rollout_func") is not None,
        "environment_factory": arguments.get("environment_factory") is not None,
        "images": "image" in columns or "images" in columns,
    }
    reasons = {
        "rollout_func": "the additional values that it returns belong to the whole batch",
        "environment_factory": "an environment keeps the state of one completion until its reward",
        "images": "the images of a batch are read before its completions are drawn",
    }
    clash = next((name for name, is_set in clashes.items() if is_set), None)
    if enabled[0] == "dynamic_sampling" and clash is not None:
        raise ConfigValueError(
            "dynamic_sampling=True draws some groups of a batch again. This does not work with "
            f"{clash}, because {reasons[clash]}",
            where="GRPOConfig",
            fix=f"set `dynamic_sampling=False`, or train without {clash}",
        )


class PromptChoice:
    """Chooses the prompts of one trainer. ``difficulty`` is None without the curriculum."""

    def __init__(self, trainer: TrainerSeam) -> None:
        args = getattr(trainer, "args", None)
        self.trainer = trainer
        self.max_rounds = (
            getattr(args, "max_resample_times", 0) if _is_enabled(args, "dynamic_sampling") else 0
        )
        self.curriculum_share = (
            getattr(args, "curriculum_share", None) if _is_enabled(args, "curriculum") else None
        )
        self.difficulty = (
            None if self.curriculum_share is None else Difficulty(len(trainer.training_rows))
        )
        self._unmeasured_order: list[int] | None = None

    @property
    def is_enabled(self) -> bool:
        """Whether dynamic sampling or the curriculum is on."""
        return self.max_rounds > 0 or self.difficulty is not None

    def begin_generation(self, inputs: list[dict[str, Any]]) -> Generation:
        """Choose the prompts of the generation that begins now, and return its ``Generation``.

        ``inputs`` are the rows that TRL's sampler chose for this rank.
        """
        order = self._row_order(self.trainer.completion_index.generation)
        if self.difficulty is None:
            return Generation(self.trainer, inputs, order, self.max_rounds, [])
        accelerator, group_size = self.trainer.accelerator, self.trainer.num_generations
        total = len(inputs) * accelerator.num_processes
        group_rows = [next(order) for _ in range(total // group_size)]
        first = len(inputs) * accelerator.process_index
        rank_rows = [group_rows[index // group_size] for index in range(first, first + len(inputs))]
        rank_inputs = [dict(self.trainer.training_rows[row]) for row in rank_rows]
        return Generation(self.trainer, rank_inputs, order, self.max_rounds, group_rows)

    def end_generation(self, generation: Generation) -> None:
        """Log the metrics of the generation. With the curriculum, also record the spread of the
        rewards in each group (their standard deviation).
        """
        metrics = generation.metrics()
        if self.difficulty is not None:
            rows = generation.group_rows[: generation.group_count]
            repeated = self.difficulty.measured_rows(rows)
            metrics["curriculum/repeated_share"] = len(repeated) / len(rows)
            spreads = {
                "curriculum/expected_spread": self.difficulty.mean_spread(repeated),
                "curriculum/mean_spread": self.difficulty.mean_spread(),
            }
            metrics |= {name: value for name, value in spreads.items() if value is not None}
            self.difficulty.record(generation.group_rows, generation.deviations)
            metrics["curriculum/measured_share"] = self.difficulty.measured_share
        for name, value in metrics.items():
            self.trainer.metric_values[name].append(value)

    def state(self) -> dict[str, torch.Tensor] | None:
        """Return the state that a checkpoint stores, or None without the curriculum. Later
        generations do not change the returned tensors.
        """
        return None if self.difficulty is None else {"spread": self.difficulty.spread_N}

    def load(self, state: Mapping[str, torch.Tensor] | None) -> None:
        """Restore the curriculum from ``state``. ``state`` is None if the checkpoint was written
        without the curriculum.

        Raises ValueError if the state belongs to another dataset.
        """
        if self.difficulty is not None and state is not None:
            self.difficulty.load(state["spread"].cpu())

    def _row_order(self, generation: int) -> Iterator[int]:
        """Return an iterator over all rows of the dataset, in the order in which this generation
        draws them. Each row occurs once.
        """
        seed, rows = self.trainer.args.seed, len(self.trainer.training_rows)
        order_seed = derive_seed(seed, generation, CHOICE_TURN)
        if self.difficulty is None:
            generator = torch.Generator().manual_seed(order_seed)
            return iter(torch.randperm(rows, generator=generator).tolist())
        assert self.curriculum_share is not None
        if self._unmeasured_order is None:
            generator = torch.Generator().manual_seed(seed)
            shuffled = self.trainer.args.shuffle_dataset
            order = torch.randperm(rows, generator=generator) if shuffled else torch.arange(rows)
            self._unmeasured_order = order.tolist()
        return self.difficulty.draw_order(order_seed, self._unmeasured_order, self.curriculum_share)


def _is_enabled(config: Any, name: str) -> bool:
    """Return True if the option ``name`` is on. With TRL's own GRPOConfig, which does not have the
    toolkit's options, the result is False.
    """
    return bool(getattr(config, name, False))
