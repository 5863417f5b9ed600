"""Compute the training passes over packs: the maximum number of tokens per pass, and the number of
passes per step.

A pack contains the completions of one pass, and the prompts of these completions
(train/step/packing). The size of a pack is limited by tokens, and not by rows. All completions of
one prompt are a group. If they are in the same pack, the pack contains their prompt only once. All
lengths here are the longest that the run file allows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolkit.config.trl_names import SPLIT_DEPENDENT_FIELDS
from toolkit.sizing.micro_batch import MAX_CPU_TOKENS, is_auto

if TYPE_CHECKING:
    from toolkit.config.run_config import RunConfig
    from toolkit.sizing.model_blocks import ModelSpec
    from toolkit.sizing.workload import StepPlan, Workload

PACKABLE_KINDS = ("full", "sliding")
"""Kinds of layers that packs support: in these layers tokens interact only through attention, and
each token has its own keys and values.
"""
_BUDGET_STEP, _MAX_BUDGETS = 256, 512


@dataclass(frozen=True, slots=True)
class PassSize:
    """One forward and backward pass.

    - ``tokens``: the number of tokens that the layers compute.
    - ``scored_tokens``: the number of tokens whose hidden states are the input of the head.
    - ``keys``: the number of keys that attention reads. The keys of a prompt count once per
      completion of this prompt.
    """

    tokens: int
    scored_tokens: int
    keys: int


def uses_packs(config: RunConfig, spec: ModelSpec) -> bool:
    """Whether training uses packs, as far as the run file and the architecture decide it.

    A run does not use packs in these cases: ``runtime.padding_free`` is false, the attention is
    neither sdpa nor eager, the loss depends on how the batch is split into micro-batches, or a
    layer does not have its own keys and values for each token. Sizing then counts rows with
    padding, which need more memory.
    """
    grpo = config.grpo
    if not config.runtime.padding_free or config.model.attn_implementation not in (
        None,
        "sdpa",
        "eager",
    ):
        return False
    if any(matters(grpo.get(name)) for name, matters in SPLIT_DEPENDENT_FIELDS.items()):
        return False
    experts = any(block.active_experts for block in spec.blocks)
    if experts and grpo.get("router_aux_loss_coef") is None:
        # The model's own config may enable a router loss, which needs whole micro-batches.
        return False
    return all(block.cache.kind in PACKABLE_KINDS for block in spec.blocks)


def longest_prompt_and_completion(work: Workload) -> tuple[int, int]:
    """Return (tokens of the shared prompt, tokens of the completion) of the longest sequence."""
    completion = min(work.completion_tokens, work.sequence_tokens)
    return work.sequence_tokens - completion, completion


def max_groups(work: Workload) -> int:
    """The largest possible number of groups among the completions of one process. A group contains
    all completions of one prompt.
    """
    rows, group = work.rollouts, work.generations
    if rows % group == 0:
        return rows // group
    return 1 if group % rows == 0 else min(rows, -(-rows // group) + 1)


def all_rows_tokens(work: Workload) -> int:
    """The number of tokens of a pack (rows joined without padding) that contains all completions of
    one process, and the prompts of these completions.
    """
    prompt, completion = longest_prompt_and_completion(work)
    return max_groups(work) * prompt + work.rollouts * completion


def token_budgets(config: RunConfig, work: Workload, *, on_cpu: bool) -> tuple[int, ...] | None:
    """Return the candidates for the maximum number of tokens per pass, the largest first.

    Return None if the run file sets the micro-batch but not ``runtime.pack_tokens``. A pass is then
    limited by rows, and not by tokens.
    """
    all_tokens, sequence = all_rows_tokens(work), work.sequence_tokens
    configured = config.runtime.pack_tokens
    if isinstance(configured, int):
        return (max(sequence, min(configured, all_tokens)),)
    if not is_auto(config.grpo):
        return None
    if all_tokens <= sequence:
        return (sequence,)
    if on_cpu:  # the choice must not depend on the free memory
        return (max(sequence, min(all_tokens, MAX_CPU_TOKENS)),)
    spacing = max(_BUDGET_STEP, all_tokens // _MAX_BUDGETS // _BUDGET_STEP * _BUDGET_STEP)
    between = range((all_tokens - 1) // spacing * spacing, sequence, -spacing)
    return (all_tokens, *between, sequence)


def largest_pass(work: Workload, step: StepPlan) -> PassSize:
    """The numbers of tokens and keys in the largest pass of a step."""
    rows = step.micro_batch * min(work.completion_tokens, work.sequence_tokens)
    tokens = step.micro_batch * work.sequence_tokens
    if step.pack_tokens is None:
        return PassSize(tokens, rows, tokens)
    prompt, completion = longest_prompt_and_completion(work)
    tokens = step.pack_tokens
    scored = min(tokens, work.rollouts * completion)
    # With short completions a pack has all rows, and each row reads the keys of its prompt.
    return PassSize(tokens, scored, tokens + min(work.rollouts, tokens) * prompt)


def passes_per_step(work: Workload, tokens: int, share: float = 1.0) -> int:
    """The number of passes per step, if a pack has at most ``tokens`` tokens, and the average
    completion has ``share`` times the maximum length of a completion.
    """
    prompt, longest = longest_prompt_and_completion(work)
    completion = max(1, round(longest * share))
    groups = max_groups(work)
    group_rows = -(-work.rollouts // groups)
    groups_per_pass = tokens // (prompt + group_rows * completion)
    if groups_per_pass:
        return -(-groups // groups_per_pass)
    rows = max(1, (tokens - prompt) // completion)
    return groups * -(-group_rows // rows)


def tokens_per_step(work: Workload, tokens: int) -> int:
    """The maximum number of tokens of a step, summed over its passes. Each pass computes one pack
    (joined prompts and completions) of at most ``tokens`` tokens. If the completions of a prompt
    are divided over several packs, each of these packs contains the prompt.
    """
    prompt, _ = longest_prompt_and_completion(work)
    pass_count, groups = passes_per_step(work, tokens), max_groups(work)
    return all_rows_tokens(work) + max(0, pass_count - groups) * prompt
