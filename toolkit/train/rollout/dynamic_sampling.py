"""Dynamic sampling: groups whose rewards have no spread are replaced by groups of other prompts
(DAPO, Yu et al. 2025, https://arxiv.org/abs/2503.14476, section 3.2).

TRL 1.16 has no option for it. Its ``_generate_and_score_completions`` draws completions with
``_generate(prompts)``, computes log-probabilities, scores with ``_calculate_rewards(inputs,
prompts, ...)`` and normalizes. A ``Generation`` completes the batch after the draw and before
log-probabilities are computed, so that these are computed only for completions that are trained on.
It scores the drawn completions, draws and scores groups of other prompts, and writes them into the
lists ``inputs`` and ``prompts``, which TRL uses afterwards. Each completion is scored once.
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
from toolkit.train.trainer_seam import Drawn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from toolkit.train.trainer_seam import TrainerSeam

ROUND = "resample_round"
"""Column of the completions table: 0 for the first draw, else the round that drew the group."""


@dataclass(slots=True)
class Completion:
    """One completion, with its prompt, tokens and log-probabilities."""

    row: int | None
    """Its row of the data set; None for those that TRL's sampler chose."""
    prompt: Any
    prompt_ids: list[int]
    completion_ids: list[int]
    tool_mask: list[int] | None
    completion: Any
    logprobs: Any
    columns: dict[str, Any]
    """The values that rewards passed to ``log_extra`` for this completion."""


class Generation:
    """One generation of training, from the choice of its prompts to the completions that are
    trained on.
    """

    def __init__(
        self,
        trainer: TrainerSeam,
        inputs: list[dict[str, Any]],
        order: Iterator[int],
        rounds: int,
        chosen: list[int],
    ) -> None:
        """``inputs`` are this rank's rows; ``order`` has further rows of the data set; groups are
        drawn again at most ``rounds`` times. ``chosen`` are the rows of the groups of all ranks if
        the curriculum chose them.
        """
        self.trainer, self.order, self.most_rounds = trainer, order, rounds
        self.inputs = list(inputs)
        self.group: int = trainer.num_generations
        self.ranks: int = trainer.accelerator.num_processes
        self.groups = len(inputs) * self.ranks // self.group
        self.rewards: torch.Tensor | None = None
        """The rewards of the completions of all ranks, a column per function, after
        ``replace_empty_groups``.
        """
        self.rows = chosen
        """The data set's row of each group that was drawn, with ``deviations`` of its rewards."""
        self.deviations: list[float] = []
        self.rounds = self.sampled = self.before = self.after = self.discarded_tokens = 0
        self.drawing = False
        """True while this object draws more completions."""
        self._logged = trainer.completion_metric_counts()

    def replace_empty_groups(self, prompts: list[Any], drawn: Drawn) -> Drawn:
        """Score ``drawn``, and replace its groups without spread, here and in ``prompts``."""
        self.drawing = True
        mine = self._completions([None] * len(prompts), prompts, drawn)
        rewards = self._score(self.inputs, prompts, drawn, mine)
        found = self._spread(rewards)
        empty = [group for group, signal in enumerate(found.has_signal) if not signal]
        self.before = self.after = len(empty)
        self.sampled = self.groups * self.group
        self.deviations = list(found.deviation)
        round_of = [0] * len(mine)
        if empty and self.most_rounds:
            self._resample(empty, mine, rewards, round_of)
        self.rewards = rewards
        if self.rounds:
            prompts[:] = [one.prompt for one in mine]
            drawn = self._joined(mine)
            self.trainer.describe_completions(prompts, drawn, self._logged)
        if self.most_rounds:
            self._set_columns(mine, round_of)
        return drawn

    def _resample(
        self,
        empty: list[int],
        mine: list[Completion],
        rewards: torch.Tensor,
        round_of: list[int],
    ) -> None:
        """Draw groups of other prompts until each of ``empty`` is replaced or a limit is reached.
        The other arguments are changed in place.
        """
        tokens = sum(len(one.completion_ids) for one in mine)
        further = self._further()
        while empty and self.rounds < self.most_rounds:
            rows = self._next_rows(further, len(empty))
            if not rows:
                break  # every prompt of the data set was drawn
            self.rounds += 1
            new, scored = self._draw(rows)
            tokens += sum(len(one.completion_ids) for one in self._own(new))
            self.sampled += len(new)
            found = self._spread(scored)
            if self.rows:  # chosen by the curriculum, which records its choices
                self.rows = [*self.rows, *rows]
                self.deviations += found.deviation
            good = [place for place, signal in enumerate(found.has_signal) if signal]
            for place, group in zip(good, empty, strict=False):
                source = slice(place * self.group, (place + 1) * self.group)
                target = slice(group * self.group, (group + 1) * self.group)
                rewards[target] = scored[source]
                self._put(new[source], target.start, mine, round_of)
            empty = empty[len(good) :]
        self.after = len(empty)
        kept = sum(len(one.completion_ids) for one in mine)
        self.discarded_tokens = sum(gather_object([tokens - kept]))
        self._warn(empty)

    def _put(
        self, group: list[Completion], first: int, mine: list[Completion], round_of: list[int]
    ) -> None:
        """Place the part of ``group`` that is on this rank; ``first`` is its row in the whole
        batch.
        """
        begin = self.trainer.accelerator.process_index * len(mine)
        for place, one in enumerate(group, start=first - begin):
            if 0 <= place < len(mine):
                assert one.row is not None
                mine[place], round_of[place] = one, self.rounds
                self.inputs[place] = dict(self.trainer.training_rows[one.row])

    def _draw(self, rows: Sequence[int]) -> tuple[list[Completion], torch.Tensor]:
        """A group for each of ``rows``: the completions of all ranks, and their rewards."""
        each = len(rows) * self.group // self.ranks
        first = each * self.trainer.accelerator.process_index
        own = [rows[place // self.group] for place in range(first, first + each)]
        inputs = [dict(self.trainer.training_rows[row]) for row in own]
        prompts = [one["prompt"] for one in inputs]
        drawn = Drawn(*self.trainer.draw_completions(prompts))
        made = self._completions(own, prompts, drawn)
        rewards = self._score(inputs, prompts, drawn, made)
        return gather_object(made), rewards

    def _own(self, all_ranks: list[Completion]) -> list[Completion]:
        """This rank's part of what ``_draw`` returned."""
        each = len(all_ranks) // self.ranks
        rank = self.trainer.accelerator.process_index
        return all_ranks[rank * each : (rank + 1) * each]

    def _further(self) -> Iterator[int]:
        """Rows of prompts that are not in the batch yet, each prompt once."""
        used = set(gather_object([_key(one["prompt"]) for one in self.inputs]))
        for row in self.order:
            key = _key(self.trainer.training_rows[row]["prompt"])
            if key not in used:
                used.add(key)
                yield row

    def _next_rows(self, further: Iterator[int], needed: int) -> list[int]:
        """The next rows: at least ``needed``, if so many are left. Their completions can be divided
        equally between the ranks, which TRL's collectives need. A round is never larger than the
        batch.
        """
        step = self.ranks // math.gcd(self.ranks, self.group)
        rows = list(islice(further, -(-needed // step) * step))
        return rows[: len(rows) // step * step]

    def _score(
        self, inputs: list[Any], prompts: list[Any], drawn: Drawn, made: list[Completion]
    ) -> torch.Tensor:
        """The rewards of all ranks' completions; the columns of this rank's are put into
        ``made``.
        """
        if drawn.images is not None:
            raise UnsupportedError(
                "the prompts have images, and dynamic sampling and the curriculum handle text",
                where="grpo.dynamic_sampling",
                fix="set dynamic_sampling and curriculum to false",
            )
        pending = self.trainer.pending_columns
        pending.clear()
        rewards = self.trainer.score_completions(
            inputs, prompts, drawn.completions, drawn.completion_ids
        )
        if self.most_rounds:
            for name, values in pending.items():
                if len(values) == len(made):  # else they cannot be assigned to completions
                    for one, value in zip(made, values, strict=True):
                        one.columns[name] = value
        found: torch.Tensor = rewards.clone()
        return found

    def _set_columns(self, mine: list[Completion], round_of: list[int]) -> None:
        """Give TRL the columns that it will log for each trained completion."""
        pending = self.trainer.pending_columns
        pending.clear()
        for name in sorted({name for one in mine for name in one.columns}):
            pending[name].extend(one.columns.get(name) for one in mine)
        pending[ROUND].extend(round_of)

    def _spread(self, rewards: torch.Tensor) -> Any:
        trainer = self.trainer
        return spread_of(
            rewards, trainer.reward_weights, self.group, trainer.multi_objective_aggregation
        )

    @staticmethod
    def _completions(
        rows: Sequence[int | None], prompts: list[Any], drawn: Drawn
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
    def _joined(mine: list[Completion]) -> Drawn:
        """The completions in TRL's layout."""
        masks = [one.tool_mask for one in mine if one.tool_mask is not None]
        logprobs = [one.logprobs for one in mine]
        return Drawn(
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
        """The metrics of dynamic sampling; shares are relative to the groups of the batch."""
        if not self.most_rounds:
            return {}
        name = "dynamic_sampling"
        return {
            f"{name}/no_spread_before": self.before / self.groups,
            f"{name}/no_spread_after": self.after / self.groups,
            f"{name}/rounds": self.rounds,
            f"{name}/sampled_completions": self.sampled,
            f"{name}/discarded_completions": self.sampled - self.groups * self.group,
            f"{name}/discarded_tokens": self.discarded_tokens,
        }

    def _warn(self, empty: list[int]) -> None:
        """Say once that groups without spread are left, and why."""
        trainer = self.trainer
        if not empty or trainer.left_groups_reported or not trainer.accelerator.is_main_process:
            return
        trainer.left_groups_reported = True
        limit = self.rounds >= self.most_rounds
        why = (
            f"max_resample_times is {self.most_rounds}"
            if limit
            else f"all {len(trainer.training_rows)} rows of the data set were drawn"
        )
        warnings.warn(
            f"dynamic sampling: {len(empty)} of {self.groups} groups still have rewards without"
            f" spread after {self.rounds} more rounds ({why}). They are trained on as they are, and"
            " teach nothing. dynamic_sampling/no_spread_after in metrics.jsonl counts them; this is"
            " said once",
            ToolkitWarning,
            stacklevel=2,
        )


def _key(prompt: Any) -> str:
    """A digest of a prompt: a data set may have the same prompt in several rows."""
    text = json.dumps(prompt, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()
