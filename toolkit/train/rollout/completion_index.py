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
    """Numbers the completions that ``trainer`` draws.

    Attributes of the trainer may be missing, because TRL's tests create trainers with
    ``object.__new__``.
    """

    def __init__(self, trainer: TrainerSeam) -> None:
        self.trainer = trainer
        self._key: tuple[str, int] | None = None
        self._done = 0
        self._turn = 0
        self._numbers: list[int] | None = None
        self._texts: list[list[int]] = []

    @property
    def generation(self) -> int:
        """In training, this is the number of the current generation. In an evaluation, this is the
        optimizer step at which the evaluation runs.
        """
        return self._now()[1]

    def begin(self, count: int) -> None:
        """Begin a batch of ``count`` prompt rows on this rank. ``count`` is equal on all ranks."""
        mode, key = self._now()
        if self._key != (mode, key):
            self._key, self._done = (mode, key), 0
        accelerator = getattr(self.trainer, "accelerator", None)
        first = self._done + count * getattr(accelerator, "process_index", 0)
        self._done += count * getattr(accelerator, "num_processes", 1)
        self._numbers, self._turn, self._texts = list(range(first, first + count)), -1, []

    @property
    def numbers(self) -> list[int]:
        """The row numbers (in the whole batch) of the completions of the latest sampling call.
        Before the second turn of a tool loop, these are the numbers of all rows of this rank.
        """
        return list(self._numbers or ())

    def call(self, prompts: Sequence[list[int]]) -> tuple[int, list[int]]:
        """Begin the next sampling call. Return the seed of the call, and the row number of each
        prompt.

        The seed of a completion is derived from the seed of the call and the row number.
        """
        if self._numbers is None or (not self._texts and len(prompts) != len(self._numbers)):
            self.begin(len(prompts))
        self._turn += 1
        assert self._numbers is not None
        numbers = self._find(prompts) if self._texts else self._numbers
        mode, key = self._now()
        turn = self._turn + (EVALUATION_TURN_OFFSET if mode == "eval" else 0)
        return derive_seed(getattr(_attribute(self.trainer, "args"), "seed", 0), key, turn), numbers

    def drawn(
        self, numbers: list[int], prompts: Sequence[list[int]], completions: Sequence[list[int]]
    ) -> None:
        """Record the drawn completions. In a run with tools they are needed to find the rows that
        the next turn continues.
        """
        if not getattr(self.trainer, "tools", None):
            self._numbers = None
            return
        self._numbers = numbers
        self._texts = [[*p, *c] for p, c in zip(prompts, completions, strict=True)]

    def _now(self) -> tuple[str, int]:
        """Return the current mode and a number: ("train", the number of the generation), or
        ("eval", the optimizer step at which the evaluation runs).
        """
        model, args = _attribute(self.trainer, "model"), _attribute(self.trainer, "args")
        if not getattr(model, "training", True):
            return "eval", getattr(_attribute(self.trainer, "state"), "global_step", 0)
        micro_steps = getattr(args, "steps_per_generation", None) or 1
        every = micro_steps * (getattr(self.trainer, "num_iterations", None) or 1)
        return "train", getattr(self.trainer, "micro_steps", 0) // every

    def _find(self, prompts: Sequence[list[int]]) -> list[int]:
        """Return the row number of each prompt of a later turn of the tool loop.

        TRL does not pass the row numbers, but keeps the order of the rows. The prompt of a later
        turn begins with the prompt and the completion of the turn before. So this method finds the
        rows by comparing tokens. If a prompt was truncated, its row is found by its position.
        """
        assert self._numbers is not None
        found, place = [], 0
        for left, prompt in enumerate(prompts):
            last = len(self._texts) - (len(prompts) - left)
            text = (t for t in range(place, last + 1) if _starts_with(prompt, self._texts[t]))
            place = next(text, min(place, last))
            found.append(self._numbers[place])
            place += 1
        return found


def _starts_with(prompt: list[int], text: list[int]) -> bool:
    return prompt[: len(text)] == text


def _attribute(trainer: TrainerSeam, name: str) -> Any:
    return getattr(trainer, name, None)
