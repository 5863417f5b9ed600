"""Training passes over packs: how many tokens one has at most, and how many passes a step takes.

A pack holds the completions of one pass and each of their prompts once (train/step/packing). Its
size is bounded by a number of tokens, not of rows, so a group of long sequences shares its prompt
where the tokens fit. Lengths here are the longest that the run file allows: the worst case.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolkit.config.trl_names import CUT_MATTERS
from toolkit.sizing.micro_batch import CPU_TOKENS, is_auto

if TYPE_CHECKING:
    from toolkit.config.run_config import RunConfig
    from toolkit.sizing.model_blocks import ModelSpec
    from toolkit.sizing.workload import StepPlan, Workload

PACKED = ("full", "sliding")
"""Layers whose only mixing of tokens is attention with keys and values for each token."""
_STEP, _CANDIDATES = 256, 512


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward and backward pass: tokens that go through the layers, those whose hidden states
    reach the head, and the keys that attention reads (a prompt's once for each completion).
    """

    tokens: int
    scored_tokens: int
    keys: int


def uses_packs(config: RunConfig, spec: ModelSpec) -> bool:
    """Whether training merges its micro-batches and cuts them by tokens, as far as the run file and
    the architecture tell. False is the safe answer: rows are counted then.
    """
    grpo = config.grpo
    if not config.runtime.padding_free or config.model.attn_implementation not in (
        None,
        "sdpa",
        "eager",
    ):
        return False
    if any(matters(grpo.get(name)) for name, matters in CUT_MATTERS.items()):
        return False
    experts = any(block.active_experts for block in spec.blocks)
    if experts and grpo.get("router_aux_loss_coef") is None:
        # The model's own config may ask for a router's loss, which needs whole micro-batches.
        return False
    return all(block.cache.kind in PACKED for block in spec.blocks)


def longest_pair(work: Workload) -> tuple[int, int]:
    """(tokens of a prompt that are shared, of a completion) of the longest sequence."""
    completion = min(work.completion_tokens, work.sequence_tokens)
    return work.sequence_tokens - completion, completion


def groups_of(work: Workload) -> int:
    """Groups that one process's rollouts belong to, at most."""
    rows, group = work.rollouts, work.generations
    if rows % group == 0:
        return rows // group
    return 1 if group % rows == 0 else min(rows, -(-rows // group) + 1)


def whole_tokens(work: Workload) -> int:
    """Tokens of a pack of all rollouts of a process."""
    prompt, completion = longest_pair(work)
    return groups_of(work) * prompt + work.rollouts * completion


def budgets(config: RunConfig, work: Workload, *, on_cpu: bool) -> tuple[int, ...] | None:
    """The candidates for the tokens of a pass, the largest first; None where rows decide: the
    micro-batch is written, and ``runtime.pack_tokens`` is not.
    """
    whole, one = whole_tokens(work), work.sequence_tokens
    written = config.runtime.pack_tokens
    if isinstance(written, int):
        return (max(one, min(written, whole)),)
    if not is_auto(config.grpo):
        return None
    if whole <= one:
        return (one,)
    if on_cpu:  # the choice must not depend on what memory is free
        return (max(one, min(whole, CPU_TOKENS)),)
    step = max(_STEP, whole // _CANDIDATES // _STEP * _STEP)
    between = range((whole - 1) // step * step, one, -step)
    return (whole, *between, one)


def pass_of(work: Workload, step: StepPlan) -> Pass:
    """The largest pass of a step."""
    rows = step.micro_batch * min(work.completion_tokens, work.sequence_tokens)
    tokens = step.micro_batch * work.sequence_tokens
    if step.pack_tokens is None:
        return Pass(tokens, rows, tokens)
    prompt, completion = longest_pair(work)
    tokens = step.pack_tokens
    scored = min(tokens, work.rollouts * completion)
    # With short completions a pack holds all rows, and each reads the keys of its prompt.
    return Pass(tokens, scored, tokens + min(work.rollouts, tokens) * prompt)


def passes(work: Workload, tokens: int, share: float = 1.0) -> int:
    """Packs of at most ``tokens`` that a step takes where completions have ``share`` of their
    longest length on average.
    """
    prompt, longest = longest_pair(work)
    completion = max(1, round(longest * share))
    groups = groups_of(work)
    members = -(-work.rollouts // groups)
    together = tokens // (prompt + members * completion)
    if together:
        return -(-groups // together)
    rows = max(1, (tokens - prompt) // completion)
    return groups * -(-members // rows)


def step_tokens(work: Workload, tokens: int) -> int:
    """Tokens of all passes of a step in the worst case: a group that is cut brings its prompt into
    each of its packs.
    """
    prompt, _ = longest_pair(work)
    number, groups = passes(work, tokens), groups_of(work)
    return whole_tokens(work) + max(0, number - groups) * prompt
