"""The half of the trainer that scores packs: which rows a pass needs, how a batch is split, and
which values replace rows that are left out.
"""

from __future__ import annotations

import math
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer

from toolkit.config.trl_names import CUT_MATTERS
from toolkit.policy.tensor_parallel.layers import mesh_of
from toolkit.train.rollout import sampler
from toolkit.train.step import packed_pass, packing
from toolkit.train.step.importance_sampling import loss_mask
from toolkit.train.step.packed_pass import Scope
from toolkit.train.step.sampled_head import scoring
from toolkit.train.step.step_errors import logger

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from toolkit.train.step.packing import Row


SKIPPED = "packing/skipped_rows"
"""The metric: the share of completions without a term of the loss, which no pass computes."""


class PackedSteps(Trainer):  # type: ignore[misc]  # transformers ships no usable types
    """A GRPO trainer that scores packs; with ``padding_free=False`` it uses TRL's pass.

    ``micro_rows``: rows of a micro-batch as configured, if several were merged into one
    (``merge_micro_batches``); they limit the tokens of one pass if ``pack_tokens`` is not set.
    """

    padding_free: bool = True
    micro_rows: int | None = None
    pack_tokens: int | None = None
    parts: int = 1
    """The number of parts of the last micro-batch."""
    least_parts: int = 1
    _left_out: tuple[int, int] = (0, 1)
    _scope: Scope = Scope()
    _entropy: torch.Tensor | None = None
    _observed: dict[str, Any] | None = None
    _reported_padded: bool = False

    def merge_micro_batches(self, args: Any, model: Any) -> None:
        """Merge the micro-batches of one optimizer step into one batch. Then the lengths of its
        rows decide how it is split (``row_parts``), and the group of a prompt is not spread over
        micro-batches.

        The gradient is the same for every split, except with the losses in ``CUT_MATTERS``: these
        keep their micro-batches.
        """
        self.padding_free = getattr(args, "padding_free", True)
        if not self.padding_free or packed_pass.refusal(packed_pass.base_of(model)) is not None:
            return
        if any(matters(getattr(args, name, None)) for name, matters in CUT_MATTERS.items()):
            return
        if args.router_aux_loss_coef is None and packed_pass.router_loss(model):
            return
        merged = math.gcd(args.steps_per_generation, args.gradient_accumulation_steps)
        self.micro_rows = args.per_device_train_batch_size
        args.per_device_train_batch_size *= merged
        args.steps_per_generation //= merged
        args.gradient_accumulation_steps //= merged

    # --- how a batch is split

    def row_parts(self, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
        """The rows of each part of a micro-batch; each part has its own backward pass.

        Every rank calls it, and all get the same number of parts.
        """
        size = inputs["completion_ids"].shape[0]
        rows = self.rows_to_pack(inputs)
        self._left_out = (0, size)
        if rows is None:
            micro = self.micro_rows or size
            number = min(size, max(-(-size // micro), self.least_parts))
            self.parts = number
            return list(torch.arange(size).tensor_split(number))
        dead = self._rows_without_loss(inputs)
        self._left_out = (len(dead), size)
        live = [row for row in rows if row.number not in dead]
        limit = self._token_limit(inputs) or max(packing.tokens_of(live), 1)
        if self.accelerator.num_processes > 1:
            return self._equal_parts(rows, dead, limit)
        number = max(len(packing.split_rows(live, limit)), min(self.least_parts, len(live)))
        self.parts = number
        parts = [[row.number for row in pack] for pack in packing.even_packs(live, number) if pack]
        parts[0].extend(sorted(dead))
        return [torch.tensor(sorted(part)) for part in parts]

    def _equal_parts(self, rows: list[Row], dead: frozenset[int], limit: int) -> list[torch.Tensor]:
        """Parts with the same number of rows on every rank, because TRL gathers a value for each
        row of a part.
        """
        groups = {row.prompt: row.number for row in reversed(rows)}
        ordered = sorted(rows, key=lambda row: (groups[row.prompt], -row.length, row.number))

        def fits(number: int) -> bool:
            chunks = torch.arange(len(ordered)).tensor_split(number)
            live = [[r for i in c.tolist() if (r := ordered[i]).number not in dead] for c in chunks]
            return all(packing.tokens_of(chunk) <= limit for chunk in live)

        number = next((n for n in range(1, len(rows)) if fits(n)), len(rows))
        self.parts = number = self._any_rank(max(number, min(self.least_parts, len(rows))))
        order = torch.tensor([row.number for row in ordered])
        return list(order.tensor_split(number))

    def _token_limit(self, inputs: Mapping[str, Any]) -> int | None:
        """The limit of tokens per pass: ``pack_tokens``, else those of the configured micro-batch
        at full width.
        """
        if self.micro_rows is None:
            return None
        if self.pack_tokens is not None:
            return self.pack_tokens
        width = inputs["prompt_ids"].shape[1] + self.max_completion_length
        return int(self.micro_rows * width)

    def _pass_limit(self, batch_size: int | None, width: int) -> int | None:
        """Tokens of one pass without a gradient over ``batch_size`` rows of ``width``."""
        if batch_size is None:
            return None
        if self.micro_rows is None:
            return batch_size * width
        return self.pack_tokens or min(batch_size, self.micro_rows) * width

    def rows_to_pack(self, inputs: Mapping[str, Any]) -> list[Row] | None:
        """The rows of a batch that can be a pack, or None."""
        if inputs.get("pixel_values") is not None or self.aux_loss_enabled:
            return None
        if self._packed_refusal(self.model) is not None:
            return None
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        return packing.read_rows(ids, mask, inputs["completion_ids"].shape[1])

    # --- the rows and tokens that a pass computes

    def _packed_refusal(self, model: Any) -> str | None:
        """Why packs are not scored on ``model``, or None; the reason is logged once."""
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if not self.padding_free or sharded:
            return "padding_free is off" if not sharded else "the model is sharded"
        base = packed_pass.base_of(model)
        with scoring(self, model) if mesh_of(base) is not None else nullcontext():
            reason = packed_pass.prepare(base, self._trl_pass)
        if reason is not None and not self._reported_padded:
            self._reported_padded = True
            logger.warning("training uses padded batches, which is slower: %s", reason)
        return reason

    def _trl_pass(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's own forward of a padded batch; defined by the trainer."""
        raise NotImplementedError

    def _padded_pass(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's padded pass, for the distribution that was sampled from: policy, old policy,
        reference.
        """
        with scoring(self, model):
            return self._trl_pass(model, *args, **kwargs)

    def _rows_without_loss(self, inputs: Mapping[str, Any]) -> frozenset[int]:
        """Rows whose loss is 0: their advantage is 0, and the loss has no other term than the
        policy's. If this is true of all rows, one is kept, because a pass needs one.
        """
        others = self.beta != 0 or self.top_entropy_quantile < 1 or self._entropy_bonus_enabled
        if others or self.off_policy_mask_threshold is not None or not self.model.training:
            return frozenset()
        advantages = inputs["advantages"]
        dead = (advantages == 0).reshape(advantages.shape[0], -1).all(1)
        lengths = inputs["completion_mask"].sum(1)
        numbers = frozenset(dead.nonzero().flatten().tolist())
        if len(numbers) == advantages.shape[0]:
            shortest = torch.where(lengths > 0, lengths, lengths.max() + 1).argmin()
            numbers -= {int(shortest)}
        return numbers

    def scope_of(self, inputs: Mapping[str, Any]) -> Scope:
        """The part of a micro-batch that its loss needs."""
        return Scope(self._rows_without_loss(inputs), loss_mask(inputs))

    def scores(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """What TRL 1.16's ``_get_per_token_logps_and_entropies`` returns, computed with packs if
        possible: log-probabilities and entropies (B, T) and a router loss. ``options`` are TRL's:
        ``batch_size``, ``compute_entropy``, ``compute_aux_loss``, and what images need.
        """
        batch_size: int | None = options.get("batch_size")
        others = {"batch_size", "compute_entropy"}
        plain = all(
            value is None or value is False for name, value in options.items() if name not in others
        )
        found = None
        if plain and self._packed_refusal(model) is None:
            limit = self._pass_limit(batch_size, input_ids.shape[1])
            batch = (input_ids, attention_mask, logits_to_keep)
            own_head = not sampler.distribution(self).plain
            with self.accelerator.autocast(), scoring(self, model):
                found = packed_pass.score(model, batch, self._scope, limit, own_head=own_head)
        if found is not None:
            logps, entropies = self.fill_skipped(found, self._observed or {})
            return logps, entropies if options.get("compute_entropy") else None, None
        self._scope = Scope()  # a padded pass computes all rows
        rows = batch_size if batch_size is None else min(batch_size, self.micro_rows or batch_size)
        batch = (input_ids, attention_mask, logits_to_keep)
        output: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
        output = self._padded_pass(model, *batch, **{**options, "batch_size": rows})
        return output

    def fill_skipped(
        self, scores: tuple[torch.Tensor, torch.Tensor], inputs: Mapping[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Fill the rows that were left out: log-probabilities with which every ratio is 1, and
        entropy 0 (``own_entropy`` takes the mean over the rows that were computed).
        """
        if not inputs:  # outside the loss: old or reference log-probabilities
            return scores
        logps, entropies = scores
        skipped = sorted(self._scope.skipped)
        mask = loss_mask(inputs).clone()
        mask[skipped] = 0
        if self._entropy is not None:
            self._entropy[:2] += torch.stack([(entropies.detach() * mask).sum(), mask.sum()])
        if not skipped:
            return scores
        neutral = inputs.get("old_per_token_logps", inputs.get("sampling_per_token_logps"))
        row_B1 = torch.zeros_like(mask[:, :1], dtype=torch.bool)
        row_B1[skipped] = True
        if neutral is not None:
            logps = torch.where(row_B1, torch.nan_to_num(neutral, nan=0.0), logps)
        return logps, entropies

    @contextmanager
    def own_entropy(self) -> Iterator[None]:
        """In the block, which computes the loss of a micro-batch, replace the entropy that TRL logs
        by the mean over all computed tokens of all parts and ranks. ``SKIPPED`` is the share of the
        rows, of all ranks, that were left out.
        """
        packs = self.padding_free and self._packed_refusal(self.model) is None
        if not packs or self.aux_loss_enabled or not self.model.training:
            yield
            return
        self._entropy = torch.zeros(4, device=self.accelerator.device)
        self._entropy[2:] += torch.tensor(self._left_out, device=self._entropy.device)
        try:
            yield
            sums = self.accelerator.reduce(self._entropy, reduction="sum").tolist()
            total, count, left_out, rows = sums
            self._metrics["train"][SKIPPED].append(left_out / max(rows, 1))
            noted = self._metrics["train"].get("entropy")
            if noted and count:
                noted[-1] = total / count
        finally:
            self._entropy = None
