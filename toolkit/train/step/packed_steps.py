"""The part of the trainer that uses packs, which are completions joined into one sequence.

It decides which rows a pass needs, how a batch is split into packs, and which values replace the
rows that are left out.
"""

from __future__ import annotations

import math
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer

from toolkit.config.trl_names import SPLIT_DEPENDENT_FIELDS
from toolkit.policy.tensor_parallel.layers import mesh_of
from toolkit.train.rollout import sampler
from toolkit.train.step import packed_pass, packing
from toolkit.train.step.importance_sampling import loss_mask
from toolkit.train.step.packed_pass import LossScope
from toolkit.train.step.sampled_head import sampled_head_installed
from toolkit.train.step.step_errors import logger

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from transformers import PreTrainedModel

    from toolkit.train.step.packing import Row


SKIPPED_METRIC = "packing/skipped_rows"
"""A metric: the share of completions that no pass computes, because their loss is 0."""


class PackedSteps(Trainer):  # type: ignore[misc]  # transformers ships no usable types
    """A base class of the GRPO trainer that computes log-probabilities with packs. With
    ``padding_free=False`` the trainer uses TRL's padded pass instead.

    If ``merge_micro_batches`` merged micro-batches, ``micro_rows`` is the number of rows that one
    micro-batch had before. If it merged none, ``micro_rows`` is None. After a merge, a pass has at
    most ``pack_tokens`` tokens. If ``pack_tokens`` is None, the maximum is the number of tokens of
    ``micro_rows`` rows of full width.
    """

    padding_free: bool = True
    micro_rows: int | None = None
    pack_tokens: int | None = None
    part_count: int = 1
    """The number of parts of the last micro-batch."""
    min_parts: int = 1
    _skipped_and_total: tuple[int, int] = (0, 1)
    _scope: LossScope = LossScope()
    _entropy_sums: torch.Tensor | None = None
    _loss_inputs: dict[str, Any] | None = None
    _reported_refusal: bool = False

    def merge_micro_batches(self, args: Any, model: PreTrainedModel) -> None:
        """Merge the micro-batches of one optimizer step into one batch.

        Later ``row_parts`` splits the merged batch by the lengths of its rows, and keeps the
        completions of a prompt together. With the settings in ``SPLIT_DEPENDENT_FIELDS``, the
        gradient would depend on this split, so micro-batches are not merged. With all other
        settings, the gradient does not depend on the split.
        """
        self.padding_free = getattr(args, "padding_free", True)
        if (
            not self.padding_free
            or packed_pass.reason_against_packs(packed_pass.base_of(model)) is not None
        ):
            return
        if any(
            matters(getattr(args, name, None)) for name, matters in SPLIT_DEPENDENT_FIELDS.items()
        ):
            return
        if args.router_aux_loss_coef is None and packed_pass.has_router_loss(model):
            return
        merged = math.gcd(args.steps_per_generation, args.gradient_accumulation_steps)
        self.micro_rows = args.per_device_train_batch_size
        args.per_device_train_batch_size *= merged
        args.steps_per_generation //= merged
        args.gradient_accumulation_steps //= merged

    # --- how a batch is split

    def row_parts(self, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
        """Split a micro-batch into parts, and return the row indices of each part. Each part has
        its own backward pass.

        All ranks must call this method together, and all get the same number of parts.
        """
        size = inputs["completion_ids"].shape[0]
        rows = self.rows_to_pack(inputs)
        self._skipped_and_total = (0, size)
        if rows is None:
            micro = self.micro_rows or size
            number = min(size, max(-(-size // micro), self.min_parts))
            self.part_count = number
            return list(torch.arange(size).tensor_split(number))
        rows_without_loss = self._rows_without_loss(inputs)
        self._skipped_and_total = (len(rows_without_loss), size)
        rows_with_loss = [row for row in rows if row.number not in rows_without_loss]
        max_tokens = self._token_limit(inputs) or max(packing.count_pack_tokens(rows_with_loss), 1)
        if self.accelerator.num_processes > 1:
            return self._equal_parts(rows, rows_without_loss, max_tokens)
        number = max(
            len(packing.split_rows(rows_with_loss, max_tokens)),
            min(self.min_parts, len(rows_with_loss)),
        )
        self.part_count = number
        parts = [
            [row.number for row in pack]
            for pack in packing.even_packs(rows_with_loss, number)
            if pack
        ]
        parts[0].extend(sorted(rows_without_loss))
        return [torch.tensor(sorted(part)) for part in parts]

    def _equal_parts(
        self, rows: list[Row], rows_without_loss: frozenset[int], max_tokens: int
    ) -> list[torch.Tensor]:
        """Split ``rows`` into parts. Each part has the same number of rows on every rank, because
        TRL gathers one value per row from all ranks.
        """
        groups = {row.prompt: row.number for row in reversed(rows)}
        ordered = sorted(rows, key=lambda row: (groups[row.prompt], -row.length, row.number))

        def fits(number: int) -> bool:
            chunks = torch.arange(len(ordered)).tensor_split(number)
            chunks_with_loss = [
                [r for i in c.tolist() if (r := ordered[i]).number not in rows_without_loss]
                for c in chunks
            ]
            return all(packing.count_pack_tokens(chunk) <= max_tokens for chunk in chunks_with_loss)

        number = next((n for n in range(1, len(rows)) if fits(n)), len(rows))
        self.part_count = number = self._max_over_ranks(max(number, min(self.min_parts, len(rows))))
        order = torch.tensor([row.number for row in ordered])
        return list(order.tensor_split(number))

    def _token_limit(self, inputs: Mapping[str, Any]) -> int | None:
        """The maximum number of tokens per pass: ``pack_tokens`` if set, else the tokens of
        ``micro_rows`` rows of full width (prompt and longest completion). None if micro-batches
        were not merged.
        """
        if self.micro_rows is None:
            return None
        if self.pack_tokens is not None:
            return self.pack_tokens
        width = inputs["prompt_ids"].shape[1] + self.max_completion_length
        return int(self.micro_rows * width)

    def _pass_limit(self, batch_size: int | None, width: int) -> int | None:
        """Return the maximum number of tokens in one forward pass that needs no gradient. The
        caller asks for at most ``batch_size`` rows of the length ``width`` per pass. None means no
        limit.
        """
        if batch_size is None:
            return None
        if self.micro_rows is None:
            return batch_size * width
        return self.pack_tokens or min(batch_size, self.micro_rows) * width

    def rows_to_pack(self, inputs: Mapping[str, Any]) -> list[Row] | None:
        """Return all rows of a batch, for use in packs (several rows joined into one sequence).
        Return None if packs cannot be used for the batch.
        """
        if inputs.get("pixel_values") is not None or self.aux_loss_enabled:
            return None
        if self._reason_against_packs(self.model) is not None:
            return None
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        return packing.read_rows(ids, mask, inputs["completion_ids"].shape[1])

    # --- the rows and tokens that a pass computes

    def _reason_against_packs(self, model: PreTrainedModel) -> str | None:
        """Why packs are not used for ``model``, or None if they are used. The reason is logged
        once.
        """
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if not self.padding_free or sharded:
            return "padding_free is off" if not sharded else "the model is sharded"
        base = packed_pass.base_of(model)
        with sampled_head_installed(self, model) if mesh_of(base) is not None else nullcontext():
            reason = packed_pass.install_packed_attention(base, self._trl_pass)
        if reason is not None and not self._reported_refusal:
            self._reported_refusal = True
            logger.warning("training uses padded batches, which is slower: %s", reason)
        return reason

    def _trl_pass(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's own forward pass of a padded batch. The trainer class overrides this method."""
        raise NotImplementedError

    def _padded_pass(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        """Compute the log-probabilities of the policy, the old policy or the reference with TRL's
        padded pass. The log-probabilities include the sampling settings (temperature, top-p, ...)
        with which the completions were drawn.
        """
        with sampled_head_installed(self, model):
            return self._trl_pass(model, *args, **kwargs)

    def _rows_without_loss(self, inputs: Mapping[str, Any]) -> frozenset[int]:
        """The rows whose loss is 0, because their advantage is 0 and the loss has only the policy
        term. A pass may leave out these rows.

        If the loss of every row is 0, the shortest row is not returned, because a pass needs at
        least one row.
        """
        has_other_terms = (
            self.beta != 0 or self.top_entropy_quantile < 1 or self._entropy_bonus_enabled
        )
        if has_other_terms or self.off_policy_mask_threshold is not None or not self.model.training:
            return frozenset()
        advantages = inputs["advantages"]
        has_no_loss = (advantages == 0).reshape(advantages.shape[0], -1).all(1)
        lengths = inputs["completion_mask"].sum(1)
        numbers = frozenset(has_no_loss.nonzero().flatten().tolist())
        if len(numbers) == advantages.shape[0]:
            shortest = torch.where(lengths > 0, lengths, lengths.max() + 1).argmin()
            numbers -= {int(shortest)}
        return numbers

    def loss_scope(self, inputs: Mapping[str, Any]) -> LossScope:
        """Return the rows of a micro-batch that may be skipped, because their loss is 0, and the
        mask of the tokens that the loss uses.
        """
        return LossScope(self._rows_without_loss(inputs), loss_mask(inputs))

    def logps_and_entropies(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The log-probabilities (B, T), the entropies (B, T) and the router loss of a batch.

        This method replaces TRL 1.16's ``_get_per_token_logps_and_entropies``, and uses packs if
        possible. ``options`` are the other arguments of TRL's method: ``batch_size``,
        ``compute_entropy``, ``compute_aux_loss``, and the inputs for images.
        """
        batch_size: int | None = options.get("batch_size")
        ignored = {"batch_size", "compute_entropy"}
        is_plain = all(
            value is None or value is False
            for name, value in options.items()
            if name not in ignored
        )
        scores = None
        if is_plain and self._reason_against_packs(model) is None:
            max_tokens = self._pass_limit(batch_size, input_ids.shape[1])
            batch = (input_ids, attention_mask, logits_to_keep)
            head_replaced = not sampler.sampled_distribution(self).is_plain
            with self.accelerator.autocast(), sampled_head_installed(self, model):
                scores = packed_pass.score_batch(
                    model, batch, self._scope, max_tokens, head_replaced=head_replaced
                )
        if scores is not None:
            logps, entropies = self.fill_skipped(scores, self._loss_inputs or {})
            return logps, entropies if options.get("compute_entropy") else None, None
        self._scope = LossScope()  # a padded pass computes all rows
        rows = batch_size if batch_size is None else min(batch_size, self.micro_rows or batch_size)
        batch = (input_ids, attention_mask, logits_to_keep)
        output: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
        output = self._padded_pass(model, *batch, **{**options, "batch_size": rows})
        return output

    def fill_skipped(
        self, scores: tuple[torch.Tensor, torch.Tensor], inputs: Mapping[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the log-probabilities and entropies in ``scores``, with values for the skipped
        rows (the rows that the pass did not compute).

        A skipped row gets its old log-probabilities. If there are no old log-probabilities, it gets
        the log-probabilities of the sampler. With these values, each probability ratio of the row
        is 1. The entropy of a skipped row is 0, and ``corrected_entropy_metric`` ignores this row.
        """
        if not inputs:  # outside the loss: old or reference log-probabilities
            return scores
        logps, entropies = scores
        skipped = sorted(self._scope.skipped)
        mask = loss_mask(inputs).clone()
        mask[skipped] = 0
        if self._entropy_sums is not None:
            self._entropy_sums[:2] += torch.stack([(entropies.detach() * mask).sum(), mask.sum()])
        if not skipped:
            return scores
        replacement = inputs.get("old_per_token_logps", inputs.get("sampling_per_token_logps"))
        row_B1 = torch.zeros_like(mask[:, :1], dtype=torch.bool)
        row_B1[skipped] = True
        if replacement is not None:
            logps = torch.where(row_B1, torch.nan_to_num(replacement, nan=0.0), logps)
        return logps, entropies

    @contextmanager
    def corrected_entropy_metric(self) -> Iterator[None]:
        """A context manager for computing the loss of a micro-batch. After the block, it corrects
        the logged metrics.

        TRL's logged entropy is replaced by the mean entropy of all tokens that were computed. The
        mean includes all parts of the micro-batch and all ranks. The metric ``SKIPPED_METRIC``
        is added: the share of rows that no pass computed, over all ranks.
        """
        uses_packs = self.padding_free and self._reason_against_packs(self.model) is None
        if not uses_packs or self.aux_loss_enabled or not self.model.training:
            yield
            return
        self._entropy_sums = torch.zeros(4, device=self.accelerator.device)
        self._entropy_sums[2:] += torch.tensor(
            self._skipped_and_total, device=self._entropy_sums.device
        )
        try:
            yield
            sums = self.accelerator.reduce(self._entropy_sums, reduction="sum").tolist()
            total, count, skipped, rows = sums
            self._metrics["train"][SKIPPED_METRIC].append(skipped / max(rows, 1))
            entropies = self._metrics["train"].get("entropy")
            if entropies and count:
                entropies[-1] = total / count
        finally:
            self._entropy_sums = None
