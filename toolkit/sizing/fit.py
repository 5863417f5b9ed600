"""Check whether one candidate (an engine plan and a step plan) fits on one card. Compute the memory
terms of the candidate, and the smallest and the largest possible gpu_memory_utilization (u).

    u_min = (weights + LoRA + tables + runtime + graphs + activations + KV of one sequence) / total

u_max is the largest u for which the memory of both phases fits into the free memory:

    rollouts  context + u x total + what the trainer keeps
    training  context + u x total - activations that the engine freed + what the trainer keeps
              + the tensors of a training step

With KV sleep, the KV cache is freed while training. Then the training sum has the engine's memory
without the KV cache in place of u x total, so it does not depend on u.

With KV sleep or 16-bit copies of 4-bit weights, the rollout sum also has the margin of a training
step. The reason is that torch keeps memory of a step reserved after this step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolkit.base.formatting import MIB
from toolkit.gpu.cgroup import read_cgroup
from toolkit.gpu.driver_files import ROOT
from toolkit.gpu.host import read_memory
from toolkit.sizing import engine_bytes as engines
from toolkit.sizing import kv_bytes
from toolkit.sizing.model_blocks import DTYPE_BYTES
from toolkit.sizing.terms import Term, total_bytes
from toolkit.sizing.trainer_bytes import trainer_terms

if TYPE_CHECKING:
    from toolkit.config.run_config import RunConfig
    from toolkit.sizing.device import Device
    from toolkit.sizing.engine_plan import EnginePlan
    from toolkit.sizing.model_blocks import ModelSpec
    from toolkit.sizing.workload import StepPlan, Workload

DEFAULT_HOST_BYTES = 4 << 30  # assumed if the host does not report its memory


def available_host_bytes() -> int:
    """The bytes of host memory that this process can still allocate."""
    memory = read_memory().value
    available = DEFAULT_HOST_BYTES if memory is None else memory["available"]
    try:
        cgroup = read_cgroup(ROOT)
    except (OSError, ValueError):
        return available  # the host has no control groups
    limit, used = cgroup["memory_limit"], cgroup["memory_used"]
    return available if limit is None else min(available, max(int(limit) - int(used or 0), 0))


# Bytes per logit of the tensors that ``_sample`` (generation/utils.py) makes for one position, all
# float32: logits, scores, sorted copies and probabilities.
BYTES_PER_LOGIT = 24


def transformers_terms(spec: ModelSpec, plan: EnginePlan, work: Workload) -> list[Term]:
    """Return the memory terms of sampling with transformers: the KV cache of all completions at
    once, and the temporary tensors of sampling. The KV cache of a layer grows by concatenation,
    which needs two more copies of the cache of one layer.
    """
    width = DTYPE_BYTES[plan.dtype]
    sequence_bytes = kv_bytes.sequence_bytes(spec, work.sequence_tokens, width, block_tokens=1)
    growth_bytes = (
        2 * kv_bytes.bytes_per_token(spec, width) * work.sequence_tokens // max(spec.layers, 1)
    )
    return [
        Term(
            "rollout.kv",
            work.rollouts * (sequence_bytes + growth_bytes),
            f"transformers' cache for {work.rollouts} sequences of {work.sequence_tokens} tokens",
            "rollout",
        ),
        Term(
            "rollout.logits",
            work.rollouts * spec.vocab_size * BYTES_PER_LOGIT,
            f"{work.rollouts} rows of {spec.vocab_size} logits",
            "rollout",
        ),
    ]


# The margins cover possible errors of the estimates, and memory that the caching allocator reserves
# without using it. With expandable segments (policy/cuda_allocator.py) the unused memory is a few
# pages.
STEP_MARGIN_SHARE, STEP_MARGIN_BYTES = 0.05, 128 * MIB
ENGINE_MARGIN_SHARE = 0.05
# Tokens are routed unevenly to experts, and no measurement bounds the number of tokens per expert.
EXPERT_MARGIN_SHARE = 0.10
# The engine frees its activations to the allocator after its profiling run, and the training step
# reuses this memory. Compiled activations are smaller than the bound in u_min, so only this
# fraction counts as reusable.
REUSABLE_SHARE = 0.5
ESTIMATED_TERMS = ("engine.activations", "engine.cuda_graphs", "engine.runtime")
MAX_CPU_KV_BYTES, MIN_CPU_KV_BYTES = 4 << 30, 64 * MIB
# fraction of the available memory; the rest is for data, tokenizer and other processes
USABLE_HOST_SHARE = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """The input of ``evaluate``: a run, a card, an engine plan and a step plan. ``unsplit_spec``
    describes the whole model, and ``spec`` the part of the model on one card. Both are equal if the
    model is not split over cards.
    """

    config: RunConfig
    spec: ModelSpec
    unsplit_spec: ModelSpec
    device: Device | None
    work: Workload
    plan: EnginePlan
    step: StepPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """The memory terms of one candidate, and whether they fit.

    - ``min_bytes``, ``max_bytes``: the smallest and the largest possible value of u x total (u is
      gpu_memory_utilization). ``binding_min`` and ``binding_max`` name what limits these values.
    - ``short_bytes``: the missing memory. The candidate fits if this number is 0 or less.
    - ``kv_sequence_bytes``: the KV cache of one sequence.
    - ``kv_wanted_bytes``: the KV cache of all sequences of a rollout.
    - ``kv_bytes``: the KV cache of a CPU engine; None for any other engine.
    - ``max_sampling_bytes``: the value of ``max_bytes`` if only the rollout phase had to fit.
    - ``min_margin_bytes``, ``max_margin_bytes``: the margins in ``min_bytes`` and ``max_bytes``.
    """

    terms: tuple[Term, ...]
    min_bytes: int
    max_bytes: int
    binding_min: str
    binding_max: str
    short_bytes: int
    kv_sequence_bytes: int
    kv_wanted_bytes: int
    kv_bytes: int | None = None
    max_sampling_bytes: int = 0
    min_margin_bytes: int = 0
    max_margin_bytes: int = 0

    @property
    def fits(self) -> bool:
        """Whether no memory is missing."""
        return self.short_bytes <= 0

    @property
    def holds_rollout(self) -> bool:
        """Whether the candidate fits, with a KV cache that can hold all sequences of a rollout at
        once.
        """
        cache_bytes = self.max_bytes - self.min_bytes + self.kv_sequence_bytes
        return self.fits and cache_bytes >= self.kv_wanted_bytes


def evaluate(candidate: Candidate) -> Fit:
    """Compute the terms of ``candidate`` and whether they fit."""
    trainer = trainer_terms(candidate.spec, candidate.plan, candidate.work, candidate.step)
    if not candidate.work.uses_engine:
        rollout = transformers_terms(candidate.spec, candidate.plan, candidate.work)
        return _fit_without_engine(
            candidate, [*rollout, *trainer, *_margin_terms(candidate, [], trainer)]
        )
    engine = engines.engine_terms(candidate.spec, candidate.plan)
    terms = [*engine, *trainer, *_margin_terms(candidate, engine, trainer)]
    return _fit_on_card(candidate, terms) if candidate.device else _fit_on_host(candidate, terms)


def _margin_terms(candidate: Candidate, engine: list[Term], trainer: list[Term]) -> list[Term]:
    unknown_share = candidate.spec.margin
    estimated_bytes = sum(term.nbytes for term in engine if term.name in ESTIMATED_TERMS)
    weight_bytes = sum(
        term.nbytes for term in (*engine, *trainer) if term.name.endswith(".weights")
    )
    margins = []
    if engine or unknown_share:
        margins.append(
            Term(
                "margin.engine",
                int(
                    estimated_bytes * (ENGINE_MARGIN_SHARE + unknown_share)
                    + weight_bytes * unknown_share
                ),
                f"{ENGINE_MARGIN_SHARE + unknown_share:.0%} of the estimated terms"
                + (f", {unknown_share:.0%} of the weights" if unknown_share else ""),
            )
        )
    fixed_bytes = STEP_MARGIN_BYTES if candidate.device else 0
    share = STEP_MARGIN_SHARE + unknown_share
    if any(block.active_experts for block in candidate.spec.blocks):
        share += EXPERT_MARGIN_SHARE
    margins.append(
        Term(
            "margin.fragmentation",
            int(total_bytes(trainer, "training") * share) + fixed_bytes,
            f"{share:.0%} of a step" + (f", and {fixed_bytes // MIB} MiB" if fixed_bytes else ""),
            "training",
        )
    )
    return margins


def _is_engine_term(term: Term) -> bool:
    return term.name.startswith("engine.") or term.name == "margin.engine"


def _fit_on_card(candidate: Candidate, terms: list[Term]) -> Fit:
    device = candidate.device
    assert device is not None
    engine = [term for term in terms if _is_engine_term(term)]
    others = [term for term in terms if not _is_engine_term(term)]
    sequence_kv_bytes = engines.kv_sequence_bytes(
        candidate.spec, candidate.plan, candidate.plan.max_model_len
    )
    engine_bytes, freed_bytes = total_bytes(engine), total_bytes(engine, "rollout")
    copies_bytes = candidate.plan.copies_bytes
    resident_bytes, step_bytes = total_bytes(others, "always"), total_bytes(others, "training")
    available = device.free_bytes - device.context_bytes
    limits = {
        "free memory - context - what the trainer keeps (rollout phase)": available
        - resident_bytes,
        "the card": device.cuda_total_bytes,
    }
    # After a training step the KV cache is mapped again while torch still reserves memory of the
    # step.
    fragments = sum(term.nbytes for term in others if term.name == "margin.fragmentation")
    max_beside_fragments = available - resident_bytes - fragments
    max_sampling = min(*limits.values(), max_beside_fragments)
    if candidate.plan.sleep or copies_bytes:
        name = (
            "free memory - context - what the trainer keeps and torch still reserves "
            "(rollout phase)"
        )
        limits[name] = max_beside_fragments
    min_bytes = engine_bytes + sequence_kv_bytes
    missing = min_bytes - available  # without KV sleep, at most the bytes missing for u_min
    if candidate.plan.sleep:
        # Memory that is missing while the KV cache sleeps is missing at every u, so the interval is
        # empty by that amount.
        missing = engine_bytes - freed_bytes + resident_bytes + step_bytes - available
        name = f"a training step while the KV cache sleeps ({_largest_term(others, 'training')})"
        limits |= {name: min_bytes - missing} if missing > 0 else {}
    else:
        name = f"free memory - context - a training step ({_largest_term(others, 'training')})"
        reusable = int((freed_bytes - copies_bytes) * REUSABLE_SHARE) + copies_bytes
        limits[name] = available - resident_bytes - step_bytes + reusable
    binding = min(limits, key=lambda name: limits[name])
    return Fit(
        terms=tuple(terms),
        min_bytes=min_bytes,
        max_bytes=limits[binding],
        binding_min=f"{_largest_term(engine, 'always', 'rollout')} + KV of one sequence",
        binding_max=binding,
        short_bytes=max(missing, min_bytes - limits[binding]),
        kv_sequence_bytes=sequence_kv_bytes,
        kv_wanted_bytes=_rollout_kv_bytes(candidate),
        max_sampling_bytes=max_sampling,
        min_margin_bytes=sum(term.nbytes for term in engine if term.name == "margin.engine"),
        max_margin_bytes=sum(term.nbytes for term in others if term.name.startswith("margin.")),
    )


def _fit_on_host(candidate: Candidate, terms: list[Term]) -> Fit:
    """The fit for an engine on the CPU. Its KV cache has a fixed size and is not a fraction of the
    memory of a card.
    """
    sequence_kv_bytes = engines.kv_sequence_bytes(
        candidate.spec, candidate.plan, candidate.plan.max_model_len
    )
    rollout_kv_bytes = _rollout_kv_bytes(candidate)
    cache = max(sequence_kv_bytes, min(2 * rollout_kv_bytes, MAX_CPU_KV_BYTES), MIN_CPU_KV_BYTES)
    engine = [term for term in terms if _is_engine_term(term)]
    others = [term for term in terms if not _is_engine_term(term)]
    always = total_bytes(terms, "always") + cache
    needed = always + max(total_bytes(engine, "rollout"), total_bytes(others, "training"))
    available = int(available_host_bytes() * USABLE_HOST_SHARE)
    return Fit(
        terms=tuple(terms),
        min_bytes=needed,
        max_bytes=available,
        binding_min=_largest_term(terms, "always", "training"),
        binding_max=f"{USABLE_HOST_SHARE:.0%} of the available host memory",
        short_bytes=needed - available,
        kv_sequence_bytes=sequence_kv_bytes,
        kv_wanted_bytes=sequence_kv_bytes,
        kv_bytes=cache,
    )


def _fit_without_engine(candidate: Candidate, terms: list[Term]) -> Fit:
    """The fit of a run without an engine. The trainer's own model also samples the rollouts, with
    the method ``generate`` of transformers.
    """
    device = candidate.device
    needed = total_bytes(terms, "always") + max(
        total_bytes(terms, "rollout"), total_bytes(terms, "training")
    )
    if device is not None:
        available, limit_name = device.free_bytes - device.context_bytes, "free memory - context"
    else:
        available, limit_name = (
            int(available_host_bytes() * USABLE_HOST_SHARE),
            f"{USABLE_HOST_SHARE:.0%} of the available host memory",
        )
    return Fit(
        terms=tuple(terms),
        min_bytes=needed,
        max_bytes=available,
        binding_min=_largest_term(terms, "always", "rollout", "training"),
        binding_max=limit_name,
        short_bytes=needed - available,
        kv_sequence_bytes=0,
        kv_wanted_bytes=0,
    )


def _rollout_kv_bytes(candidate: Candidate) -> int:
    """The KV bytes of all sequences that the engine runs at once, at the run's maximum length. With
    prefix caching, the completions of a group share the blocks of their prompt.
    """
    plan, work = candidate.plan, candidate.work
    sequences = min(plan.max_num_seqs, work.rollouts)
    length = min(work.sequence_tokens, plan.max_model_len)
    unshared_bytes = sequences * engines.kv_sequence_bytes(candidate.spec, plan, length)
    if not candidate.config.model.enable_prefix_caching or work.rollouts % work.generations:
        return unshared_bytes
    groups = min(work.rollouts // work.generations, sequences)
    prompt = min(work.prompt_tokens, length - 1)
    return unshared_bytes - (sequences - groups) * engines.kv_shared_bytes(
        candidate.spec, plan, prompt
    )


def _largest_term(terms: list[Term], *phases: str) -> str:
    largest = max((term for term in terms if term.phase in phases), key=lambda term: term.nbytes)
    return largest.name
