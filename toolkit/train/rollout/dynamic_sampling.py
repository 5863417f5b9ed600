"""Dynamic sampling: if all completions of a group have the same reward (no spread), replace the
group by a group of another prompt (DAPO, Yu et al. 2025, https://arxiv.org/abs/2503.14476, section
3.2).

TRL 1.16 has no option for dynamic sampling. Its ``_generate_and_score_completions`` has four steps:
``_generate(prompts)`` draws completions, log-probabilities are computed,
``_calculate_rewards(inputs, prompts, ...)`` scores the completions, and the rewards are normalized.

A ``Generation`` runs after the first step. It scores the drawn completions, then draws and scores
groups of other prompts. It writes the new groups into the lists ``inputs`` and ``prompts``, which
TRL uses in the later steps. Thus log-probabilities are computed only for completions that are
trained on. The trainer's ``_calculate_rewards`` returns the rewards that the ``Generation`` has
already computed, so each completion is scored only once.
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
    """The row of the dataset. None if TRL's sampler chose the prompt."""
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
        max_rounds: int,
        group_rows: list[int],
    ) -> None:
        """``inputs`` are the rows of this rank. ``order`` yields further rows of the dataset.
        ``max_rounds`` is the maximum number of rounds in which groups are replaced. If the
        curriculum chose the prompts, ``group_rows`` has one entry for each group (of all ranks):
        the index of the group's row in the dataset.
        """
        self.trainer, self.order, self.max_rounds = trainer, order, max_rounds
        self.inputs = list(inputs)
        self.group_size: int = trainer.num_generations
        self.rank_count: int = trainer.accelerator.num_processes
        self.group_count = len(inputs) * self.rank_count // self.group_size
        self.rewards: torch.Tensor | None = None
        """The rewards of the completions of all ranks, with a column per function. None before
        ``replace_groups_without_signal``.
        """
        self.group_rows = group_rows
        """With the curriculum, the dataset's row of each drawn group."""
        self.deviations: list[float] = []
        """The standard deviation of the rewards of each drawn group."""
        self.rounds = self.sampled_count = self.no_spread_before = self.no_spread_after = (
            self.discarded_tokens
        ) = 0
        self.is_drawing = False
        """True while this object draws more completions."""
        self._logged = trainer.completion_metric_counts()

    def replace_groups_without_signal(
        self, prompts: list[Any], drawn: CompletionBatch
    ) -> CompletionBatch:
        """Score the completions ``drawn``, and replace the groups in which all rewards are equal.

        Returns the completions of this rank after the replacement. ``prompts`` and ``self.inputs``
        are changed in place.
        """
        self.is_drawing = True
        local = self._completions([None] * len(prompts), prompts, drawn)
        rewards = self._score(self.inputs, prompts, drawn, local)
        spread = self._spread(rewards)
        groups_without_signal = [
            group for group, has_signal in enumerate(spread.has_signal) if not has_signal
        ]
        self.no_spread_before = self.no_spread_after = len(groups_without_signal)
        self.sampled_count = self.group_count * self.group_size
        self.deviations = list(spread.deviation)
        round_of = [0] * len(local)
        if groups_without_signal and self.max_rounds:
            self._resample(groups_without_signal, local, rewards, round_of)
        self.rewards = rewards
        if self.rounds:
            prompts[:] = [completion.prompt for completion in local]
            drawn = self._completion_batch(local)
            self.trainer.log_completion_metrics(prompts, drawn, self._logged)
        if self.max_rounds:
            self._set_logged_columns(local, round_of)
        return drawn

    def _resample(
        self,
        groups_without_signal: list[int],
        local: list[Completion],
        rewards: torch.Tensor,
        round_of: list[int],
    ) -> None:
        """Draw groups of other prompts in rounds. Each group in which all rewards are equal is
        replaced by a drawn group whose rewards differ. ``groups_without_signal`` has the indices of
        the groups to replace. End when all these groups are replaced, when the maximum number of
        rounds is reached, or when all prompts of the dataset were drawn.

        Three arguments are changed in place: the completions of this rank (``local``), the rewards
        of all ranks (``rewards``), and the round in which each completion of this rank was drawn
        (``round_of``).
        """
        drawn_tokens = sum(len(completion.completion_ids) for completion in local)
        unused_rows = self._unused_rows()
        while groups_without_signal and self.rounds < self.max_rounds:
            rows = self._next_rows(unused_rows, len(groups_without_signal))
            if not rows:
                break  # all prompts of the dataset were drawn
            self.rounds += 1
            drawn, drawn_rewards = self._draw_groups(rows)
            drawn_tokens += sum(
                len(completion.completion_ids) for completion in self._drawn_here(drawn)
            )
            self.sampled_count += len(drawn)
            spread = self._spread(drawn_rewards)
            if self.group_rows:  # the curriculum records the spread of every group that was drawn
                self.group_rows = [*self.group_rows, *rows]
                self.deviations += spread.deviation
            usable_groups = [
                index for index, has_signal in enumerate(spread.has_signal) if has_signal
            ]
            for drawn_group, group in zip(usable_groups, groups_without_signal, strict=False):
                source = slice(drawn_group * self.group_size, (drawn_group + 1) * self.group_size)
                target = slice(group * self.group_size, (group + 1) * self.group_size)
                rewards[target] = drawn_rewards[source]
                self._copy_group(drawn[source], target.start, local, round_of)
            groups_without_signal = groups_without_signal[len(usable_groups) :]
        self.no_spread_after = len(groups_without_signal)
        kept_tokens = sum(len(completion.completion_ids) for completion in local)
        self.discarded_tokens = sum(gather_object([drawn_tokens - kept_tokens]))
        self._warn_of_unreplaced_groups()

    def _copy_group(
        self, group: list[Completion], first: int, local: list[Completion], round_of: list[int]
    ) -> None:
        """Copy the completions of the new ``group`` that belong to this rank into ``local`` (the
        completions of this rank). ``first`` is the index of the group's first completion in
        the batch of all ranks.
        """
        first_of_rank = self.trainer.accelerator.process_index * len(local)
        for index, completion in enumerate(group, start=first - first_of_rank):
            if 0 <= index < len(local):
                assert completion.row is not None
                local[index], round_of[index] = completion, self.rounds
                self.inputs[index] = dict(self.trainer.training_rows[completion.row])

    def _draw_groups(self, rows: Sequence[int]) -> tuple[list[Completion], torch.Tensor]:
        """Draw a group of completions for each of ``rows``. Return the completions of all ranks and
        their rewards.
        """
        per_rank = len(rows) * self.group_size // self.rank_count
        first = per_rank * self.trainer.accelerator.process_index
        rank_rows = [rows[index // self.group_size] for index in range(first, first + per_rank)]
        inputs = [dict(self.trainer.training_rows[row]) for row in rank_rows]
        prompts = [row_inputs["prompt"] for row_inputs in inputs]
        drawn = CompletionBatch(*self.trainer.generate_completions(prompts))
        completions = self._completions(rank_rows, prompts, drawn)
        rewards = self._score(inputs, prompts, drawn, completions)
        return gather_object(completions), rewards

    def _drawn_here(self, all_ranks: list[Completion]) -> list[Completion]:
        """Return those completions of ``all_ranks`` (the result of ``_draw_groups``) that this
        rank drew.
        """
        per_rank = len(all_ranks) // self.rank_count
        rank = self.trainer.accelerator.process_index
        return all_ranks[rank * per_rank : (rank + 1) * per_rank]

    def _unused_rows(self) -> Iterator[int]:
        """Yield further rows of the dataset. A row whose prompt is already in the batch, or was
        yielded before, is skipped.
        """
        used_prompts = set(
            gather_object([_prompt_digest(row_inputs["prompt"]) for row_inputs in self.inputs])
        )
        for row in self.order:
            digest = _prompt_digest(self.trainer.training_rows[row]["prompt"])
            if digest not in used_prompts:
                used_prompts.add(digest)
                yield row

    def _next_rows(self, unused_rows: Iterator[int], needed: int) -> list[int]:
        """Return the rows of the dataset for the next round: at least ``needed`` rows, if so many
        are left.

        The number of rows is rounded up, so that every rank draws the same number of completions.
        TRL's collective calls need equal shapes. A round is never larger than the batch.
        """
        multiple = self.rank_count // math.gcd(self.rank_count, self.group_size)
        rows = list(islice(unused_rows, -(-needed // multiple) * multiple))
        return rows[: len(rows) // multiple * multiple]

    def _score(
        self,
        inputs: list[Any],
        prompts: list[Any],
        drawn: CompletionBatch,
        completions: list[Completion],
    ) -> torch.Tensor:
        """Score the completions of this rank, and return the rewards of all ranks.

        ``completions`` has the completions of this rank. Reward functions may log values for each
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
                if len(values) == len(completions):  # otherwise the values have no completion
                    for completion, value in zip(completions, values, strict=True):
                        completion.columns[name] = value
        copied: torch.Tensor = rewards.clone()
        return copied

    def _set_logged_columns(self, local: list[Completion], round_of: list[int]) -> None:
        """Pass to TRL the values that it logs for the completions of this rank (``local``). They
        are the values that the reward functions logged, and the round in which each completion was
        drawn.
        """
        pending = self.trainer.pending_columns
        pending.clear()
        for name in sorted({name for completion in local for name in completion.columns}):
            pending[name].extend(completion.columns.get(name) for completion in local)
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
                prompt=prompts[index],
                prompt_ids=drawn.prompt_ids[index],
                completion_ids=drawn.completion_ids[index],
                tool_mask=None if drawn.tool_mask is None else drawn.tool_mask[index],
                completion=drawn.completions[index],
                logprobs=None if drawn.logprobs is None else drawn.logprobs[index],
                columns={},
            )
            for index, row in enumerate(rows)
        ]

    @staticmethod
    def _completion_batch(local: list[Completion]) -> CompletionBatch:
        """Return the completions ``local`` as a ``CompletionBatch``, the result of TRL's method
        ``_generate``.
        """
        masks = [completion.tool_mask for completion in local if completion.tool_mask is not None]
        logprobs = [completion.logprobs for completion in local]
        return CompletionBatch(
            prompt_ids=[completion.prompt_ids for completion in local],
            completion_ids=[completion.completion_ids for completion in local],
            tool_mask=masks or None,
            completions=[completion.completion for completion in local],
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

    def _warn_of_unreplaced_groups(self) -> None:
        """Warn if groups with equal rewards are left after the last round, and say why. The warning
        is printed once per run.
        """
        trainer = self.trainer
        if (
            not self.no_spread_after
            or trainer.unreplaced_groups_reported
            or not trainer.accelerator.is_main_process
        ):
            return
        trainer.unreplaced_groups_reported = True
        limit_reached = self.rounds >= self.max_rounds
        reason = (
            f"max_resample_times is {self.max_rounds}"
            if limit_reached
            else f"all {len(trainer.training_rows)} rows of the dataset were drawn"
        )
        warnings.warn(
            f"dynamic sampling: in {self.no_spread_after} of {self.group_count} groups all rewards "
            f"are still equal after {self.rounds} more rounds ({reason}). The model learns nothing "
            "from these groups. In metrics.jsonl, dynamic_sampling/no_spread_after is the share "
            "of such groups in each generation. This warning is printed once",
            ToolkitWarning,
            stacklevel=2,
        )


def _prompt_digest(prompt: Any) -> str:
    """Return a digest of a prompt. Rows of the dataset with the same prompt have the
    same digest.
    """
    text = json.dumps(prompt, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()
