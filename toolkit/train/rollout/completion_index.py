"""Number the completions of a batch over all ranks, to derive the seed of each completion.

The seed of a completion is derived from (run seed, generation, turn, row). A generation is one
batch of completions that the trainer samples, and ``generation`` is its number. ``turn`` is the
number of the turn in the tool loop. ``row`` is the number of the completion in the batch, counted
over all ranks in the order in which TRL's sampler distributes the prompts.

The seed depends neither on the rank nor on how a generation is split into micro-batches. Therefore
two ranks draw the same completions as one rank with twice the batch, and a resumed run draws the
same completions as an uninterrupted one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.engine.rollout_request import derive_seed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from toolkit.train.trainer_seam import TrainerSeam

EVALUATION_TURN_OFFSET = 1 << 20
"""Turns in evaluation are numbered from this value, so that evaluation never uses the seeds of
training.
"""


class CompletionIndex:
    """Gives each completion that ``trainer`` draws a row number, and each sampling call a seed.

    Attributes of the trainer may be missing, because TRL's tests create trainers with
    ``object.__new__``.
    """

    def __init__(self, trainer: TrainerSeam) -> None:
        self.trainer = trainer
        self._current_batch: tuple[str, int] | None = None
        self._rows_begun = 0
        self._turn = 0
        self._row_numbers: list[int] | None = None
        self._sequences: list[list[int]] = []

    @property
    def generation(self) -> int:
        """In training, this is the number of the current generation. In an evaluation, this is the
        optimizer step at which the evaluation runs.
        """
        return self._mode_and_number()[1]

    def begin_batch(self, count: int) -> None:
        """Begin a batch of ``count`` prompt rows on this rank. ``count`` is equal on all ranks."""
        mode, key = self._mode_and_number()
        if self._current_batch != (mode, key):
            self._current_batch, self._rows_begun = (mode, key), 0
        accelerator = getattr(self.trainer, "accelerator", None)
        first_row = self._rows_begun + count * getattr(accelerator, "process_index", 0)
        self._rows_begun += count * getattr(accelerator, "num_processes", 1)
        self._row_numbers, self._turn, self._sequences = (
            list(range(first_row, first_row + count)),
            -1,
            [],
        )

    @property
    def row_numbers(self) -> list[int]:
        """The row number (in the whole batch) of each completion of the latest sampling call. The
        first call of a batch samples all rows of this rank. In a tool loop, later calls sample only
        the rows that continue.
        """
        return list(self._row_numbers or ())

    def begin_call(self, prompts: Sequence[list[int]]) -> tuple[int, list[int]]:
        """Begin the next sampling call. Return the seed of the call, and the row number of each
        prompt.

        The seed of a completion is derived from the seed of the call and the row number.
        """
        if self._row_numbers is None or (
            not self._sequences and len(prompts) != len(self._row_numbers)
        ):
            self.begin_batch(len(prompts))
        self._turn += 1
        assert self._row_numbers is not None
        numbers = self._find_rows(prompts) if self._sequences else self._row_numbers
        mode, key = self._mode_and_number()
        turn = self._turn + (EVALUATION_TURN_OFFSET if mode == "eval" else 0)
        return derive_seed(getattr(_attribute(self.trainer, "args"), "seed", 0), key, turn), numbers

    def record_completions(
        self, numbers: list[int], prompts: Sequence[list[int]], completions: Sequence[list[int]]
    ) -> None:
        """Record the drawn completions. In a run with tools they are needed to find the rows that
        the next turn continues.
        """
        if not getattr(self.trainer, "tools", None):
            self._row_numbers = None
            return
        self._row_numbers = numbers
        self._sequences = [[*p, *c] for p, c in zip(prompts, completions, strict=True)]

    def _mode_and_number(self) -> tuple[str, int]:
        """Return the current mode and a number: ("train", the number of the generation), or
        ("eval", the optimizer step at which the evaluation runs).
        """
        model, args = _attribute(self.trainer, "model"), _attribute(self.trainer, "args")
        if not getattr(model, "training", True):
            return "eval", getattr(_attribute(self.trainer, "state"), "global_step", 0)
        micro_steps = getattr(args, "steps_per_generation", None) or 1
        micro_steps_per_generation = micro_steps * (
            getattr(self.trainer, "num_iterations", None) or 1
        )
        return "train", getattr(self.trainer, "micro_steps", 0) // micro_steps_per_generation

    def _find_rows(self, prompts: Sequence[list[int]]) -> list[int]:
        """Return the row number of each prompt of a later turn of the tool loop.

        TRL does not pass the row numbers, but keeps the order of the rows. The prompt of a later
        turn begins with the prompt and the completion of the turn before. So this method finds the
        rows by comparing tokens. If a prompt was truncated, its row is found by its position.
        """
        assert self._row_numbers is not None
        row_numbers, row = [], 0
        for index, prompt in enumerate(prompts):
            last_row = len(self._sequences) - (len(prompts) - index)
            matching_rows = (
                candidate
                for candidate in range(row, last_row + 1)
                if _starts_with(prompt, self._sequences[candidate])
            )
            row = next(matching_rows, min(row, last_row))
            row_numbers.append(self._row_numbers[row])
            row += 1
        return row_numbers


def _starts_with(prompt: list[int], sequence: list[int]) -> bool:
    return prompt[: len(sequence)] == sequence


def _attribute(trainer: TrainerSeam, name: str) -> Any:
    return getattr(trainer, name, None)
