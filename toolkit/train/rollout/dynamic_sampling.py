"""Dynamic sampling: if all completions of a group have the same reward (no spread), replace the
group by a group of another prompt (DAPO, Yu et al. 2025, https://arxiv.org/abs/2503.14476, section
3.2).

TRL 1.16 has no option for dynamic sampling. Its ``_generate_and_score_completions`` has four steps:
``_generate(prompts)`` draws completions, log-probabilities are computed,
``_calculate_rewards(inputs, prompts, ...)`` scores the completions, and the rewards are normalized.

A ``Generation`` runs after the first step. It scores the drawn completions, then draws and scores
groups of other prompts. It writes the new groups into the lists ``inputs`` and ``prompts``, which
TRL uses in the later steps. Thus log-probabilities are computed only for completions that are
trained on, and each completion is scored only once.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object

from toolkit.base.errors import ToolkitWarning, UnsupportedError
from toolkit.train.rollout.group_spread import spread_of
from toolkit.train.trainer_seam import CompletionBatch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from toolkit.train.trainer_seam import TrainerSeam

ROUND_COLUMN = "resample_round"
"""A column of the completions table: the round that drew the group, 0 for the first draw."""


@dataclass(slots=True)
class Completion:
    """One completion, with its prompt, tokens and log-probabilities."""

    row: int | None
    """The row of the data set. None if TRL's sampler chose the prompt."""
    prompt: Any
    prompt_ids: list[int]
    completion_ids: list[int]
    tool_mask: list[int] | None
    completion: Any
    logprobs: Any
    columns: dict[str, Any]
    """The values that rewards passed to ``log_extra`` for this completion."""


class Generation:
    """One generation, which is a batch of completions that the trainer samples. The object exists
    from the choice of the prompts until the completions for training are final.
    """

    def __init__(
        self,
        trainer: TrainerSeam,
        inputs: list[dict[str, Any]],
        order: Iterator[int],
        rounds: int,
        chosen: list[int],
    ) -> None:
        """``inputs`` are the rows of this rank. ``order`` yields further rows of the data set.
        ``rounds`` is the maximum number of rounds in which groups are replaced. If the curriculum
        chose the prompts, ``chosen`` has the index of the data set row for each group of all ranks.
        """
        self.trainer, self.order, self.max_rounds = trainer, order, rounds
        self.inputs = list(inputs)
        self.group_size: int = trainer.num_generations
        self.rank_count: int = trainer.accelerator.num_processes
        self.group_count = len(inputs) * self.rank_count // self.group_size
        self.rewards: torch.Tensor | None = None
        """The rewards of the completions of all ranks, with a column per function. None before
        ``replace_empty_groups``.
        """
        self.group_rows = chosen
        """With the curriculum, the data set's row of each drawn group."""
        self.deviations: list[float] = []
        """The standard deviation of the rewards of each drawn group."""
        self.rounds = self.sampled_count = self.no_spread_before = self.no_spread_after = (
            self.discarded_tokens
        ) = 0
        self.is_drawing = False
        """True while this object draws more completions."""
        self._logged = trainer.completion_metric_counts()

    def replace_empty_groups(self, prompts: list[Any], drawn: CompletionBatch) -> CompletionBatch:
        """Score the completions ``drawn``, and replace the groups in which all rewards are equal.

        Returns the completions of this rank after the replacement. ``prompts`` and ``self.inputs``
        are changed in place.
        """
        self.is_drawing = True
        mine = self._completions([None] * len(prompts), prompts, drawn)
        rewards = self._score(self.inputs, prompts, drawn, mine)
        found = self._spread(rewards)
        empty = [group for group, signal in enumerate(found.has_signal) if not signal]
        self.no_spread_before = self.no_spread_after = len(empty)
        self.sampled_count = self.group_count * self.group_size
        self.deviations = list(found.deviation)
        round_of = [0] * len(mine)
        if empty and self.max_rounds:
            self._resample(empty, mine, rewards, round_of)
        self.rewards = rewards
        if self.rounds:
            prompts[:] = [one.prompt for one in mine]
            drawn = self._as_drawn(mine)
            self.trainer.log_completion_metrics(prompts, drawn, self._logged)
        if self.max_rounds:
            self._set_logged_columns(mine, round_of)
        return drawn

    def _resample(
        self,
        empty: list[int],
        mine: list[Completion],
        rewards: torch.Tensor,
        round_of: list[int],
    ) -> None:
        """Draw groups of other prompts in rounds. Replace the groups ``empty`` (all rewards equal)
        by drawn groups whose rewards differ. Ends when all groups of ``empty`` are replaced, when
        the maximum number of rounds is reached, or when all prompts of the data set were drawn.

        Three arguments are changed in place: the completions of this rank (``mine``), the rewards
        of all ranks (``rewards``), and the round in which each completion of this rank was drawn
        (``round_of``).
        """
        tokens = sum(len(one.completion_ids) for one in mine)
        further = self._unused_rows()
        while empty and self.rounds < self.max_rounds:
            rows = self._next_rows(further, len(empty))
            if not rows:
                break  # all prompts of the data set were drawn
            self.rounds += 1
            new, scored = self._draw_groups(rows)
            tokens += sum(len(one.completion_ids) for one in self._drawn_here(new))
            self.sampled_count += len(new)
            found = self._spread(scored)
            if self.group_rows:  # the curriculum records the spread of every group that was drawn
                self.group_rows = [*self.group_rows, *rows]
                self.deviations += found.deviation
            good = [place for place, signal in enumerate(found.has_signal) if signal]
            for place, group in zip(good, empty, strict=False):
                source = slice(place * self.group_size, (place + 1) * self.group_size)
                target = slice(group * self.group_size, (group + 1) * self.group_size)
                rewards[target] = scored[source]
                self._copy_group(new[source], target.start, mine, round_of)
            empty = empty[len(good) :]
        self.no_spread_after = len(empty)
        kept = sum(len(one.completion_ids) for one in mine)
        self.discarded_tokens = sum(gather_object([tokens - kept]))
        self._warn_of_left_groups(empty)

    def _copy_group(
        self, group: list[Completion], first: int, mine: list[Completion], round_of: list[int]
    ) -> None:
        """Copy the completions of the new ``group`` that belong to this rank into ``mine`` (the
        completions of this rank). ``first`` is the index of the group's first completion in
        the batch of all ranks.
        """
        begin = self.trainer.accelerator.process_index * len(mine)
        for place, one in enumerate(group, start=first - begin):
            if 0 <= place < len(mine):
                assert one.row is not None
                mine[place], round_of[place] = one, self.rounds
                self.inputs[place] = dict(self.trainer.training_rows[one.row])

    def _draw_groups(self, rows: Sequence[int]) -> tuple[list[Completion], torch.Tensor]:
        """Draw a group of completions for each of ``rows``. Return the completions of all ranks and
        their rewards.
        """
        each = len(rows) * self.group_size // self.rank_count
        first = each * self.trainer.accelerator.process_index
        own = [rows[place // self.group_size] for place in range(first, first + each)]
        inputs = [dict(self.trainer.training_rows[row]) for row in own]
        prompts = [one["prompt"] for one in inputs]
        drawn = CompletionBatch(*self.trainer.generate_completions(prompts))
        made = self._completions(own, prompts, drawn)
        rewards = self._score(inputs, prompts, drawn, made)
        return gather_object(made), rewards

    def _drawn_here(self, all_ranks: list[Completion]) -> list[Completion]:
        """Return those completions of ``all_ranks`` (the result of ``_draw``) that this
        rank drew.
        """
        each = len(all_ranks) // self.rank_count
        rank = self.trainer.accelerator.process_index
        return all_ranks[rank * each : (rank + 1) * each]

    def _unused_rows(self) -> Iterator[int]:
        """Yield further rows of the data set. A row whose prompt is already in the batch, or was
        yielded before, is skipped.
        """
        used = set(gather_object([_prompt_digest(one["prompt"]) for one in self.inputs]))
        for row in self.order:
            key = _prompt_digest(self.trainer.training_rows[row]["prompt"])
            if key not in used:
                used.add(key)
                yield row

    def _next_rows(self, further: Iterator[int], needed: int) -> list[int]:
        """Return the rows of the data set for the next round: at least ``needed`` rows, if so many
        are left.

        The number of rows is rounded up, so that every rank draws the same number of completions.
        TRL's collective calls need equal shapes. A round is never larger than the batch.
        """
        step = self.rank_count // math.gcd(self.rank_count, self.group_size)
        rows = list(islice(further, -(-needed // step) * step))
        return rows[: len(rows) // step * step]

    def _score(
        self, inputs: list[Any], prompts: list[Any], drawn: CompletionBatch, made: list[Completion]
    ) -> torch.Tensor:
        """Score the completions of this rank, and return the rewards of all ranks.

        ``made`` has the completions of this rank. Reward functions may log values for each
        completion. With dynamic sampling, these values are stored in ``Completion.columns``.
        """
        if drawn.images is not None:
            raise UnsupportedError(
                "the prompts have images, which dynamic sampling and the curriculum do not support",
                where="grpo.dynamic_sampling",
                fix="set grpo.dynamic_sampling and grpo.curriculum to false",
            )
        pending = self.trainer.pending_columns
        pending.clear()
        rewards = self.trainer.score_completions(
            inputs, prompts, drawn.completions, drawn.completion_ids
        )
        if self.max_rounds:
            for name, values in pending.items():
                if len(values) == len(made):  # otherwise the values have no completion
                    for one, value in zip(made, values, strict=True):
                        one.columns[name] = value
        found: torch.Tensor = rewards.clone()
        return found

    def _set_logged_columns(self, mine: list[Completion], round_of: list[int]) -> None:
        """Pass to TRL the values that it logs for the completions of this rank (``mine``). They are
        the values that the reward functions logged, and the round in which each completion was
        drawn.
        """
        pending = self.trainer.pending_columns
        pending.clear()
        for name in sorted({name for one in mine for name in one.columns}):
            pending[name].extend(one.columns.get(name) for one in mine)
        pending[ROUND_COLUMN].extend(round_of)

    def _spread(self, rewards: torch.Tensor) -> Any:
        trainer = self.trainer
        return spread_of(
            rewards, trainer.reward_weights, self.group_size, trainer.multi_objective_aggregation
        )

    @staticmethod
    def _completions(
        rows: Sequence[int | None], prompts: list[Any], drawn: CompletionBatch
    ) -> list[Completion]:
        return [
            Completion(
                row=row,
                prompt=prompts[place],
                prompt_ids=drawn.prompt_ids[place],
                completion_ids=drawn.completion_ids[place],
                tool_mask=None if drawn.tool_mask is None else drawn.tool_mask[place],
                completion=drawn.completions[place],
                logprobs=None if drawn.logprobs is None else drawn.logprobs[place],
                columns={},
            )
            for place, row in enumerate(rows)
        ]

    @staticmethod
    def _as_drawn(mine: list[Completion]) -> CompletionBatch:
        """Return the completions ``mine`` as the result of TRL's sampling call
        (``CompletionBatch``).
        """
        masks = [one.tool_mask for one in mine if one.tool_mask is not None]
        logprobs = [one.logprobs for one in mine]
        return CompletionBatch(
            prompt_ids=[one.prompt_ids for one in mine],
            completion_ids=[one.completion_ids for one in mine],
            tool_mask=masks or None,
            completions=[one.completion for one in mine],
            logprobs=None if logprobs[0] is None else logprobs,
            extra_fields={},
            images=None,
            tool_images=[],
        )

    def metrics(self) -> dict[str, float]:
        """Return the metrics of dynamic sampling. ``no_spread_before`` and ``no_spread_after`` are
        shares of the groups of the batch. The other metrics are counts.
        """
        if not self.max_rounds:
            return {}
        name = "dynamic_sampling"
        return {
            f"{name}/no_spread_before": self.no_spread_before / self.group_count,
            f"{name}/no_spread_after": self.no_spread_after / self.group_count,
            f"{name}/rounds": self.rounds,
            f"{name}/sampled_completions": self.sampled_count,
            f"{name}/discarded_completions": self.sampled_count
            - self.group_count * self.group_size,
            f"{name}/discarded_tokens": self.discarded_tokens,
        }

    def _warn_of_left_groups(self, empty: list[int]) -> None:
        """Warn if groups with equal rewards are left after the last round, and say why. The warning
        is printed once per run.
        """
        trainer = self.trainer
        if not empty or trainer.left_groups_reported or not trainer.accelerator.is_main_process:
            return
        trainer.left_groups_reported = True
        limit = self.rounds >= self.max_rounds
        why = (
            f"max_resample_times is {self.max_rounds}"
            if limit
            else f"all {len(trainer.training_rows)} rows of the data set were drawn"
        )
        warnings.warn(
            f"dynamic sampling: in {len(empty)} of {self.group_count} groups all rewards are still "
            f"equal after {self.rounds} more rounds ({why}). The model learns nothing from these "
            "groups. In metrics.jsonl, dynamic_sampling/no_spread_after is the share of such "
            "groups in each generation. This warning is printed once",
            ToolkitWarning,
            stacklevel=2,
        )


def _prompt_digest(prompt: Any) -> str:
    """Return a digest of a prompt. Rows of the data set with the same prompt have the
    same digest.
    """
    text = json.dumps(prompt, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()
