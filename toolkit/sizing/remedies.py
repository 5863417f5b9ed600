"""Find changes that make a run fit. They are ordered by their harm (such as lost precision or
shorter texts), and changes with equal harm by the bytes that they free.

Each change is tried alone. If no single change is enough, the least harmful ones are combined. A
change is offered only if the rules accept it for the card (base.capability). ``settings`` are the
keys and values to set in the run file, so that a change can be applied directly.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from toolkit.base.capability import FLOAT8_NATIVE, FOUR_BIT, build_problem
from toolkit.base.formatting import format_bytes
from toolkit.config import parallel
from toolkit.config.libraries import LEGAL_RANKS
from toolkit.gpu.cards import CARDS
from toolkit.sizing.device import Device
from toolkit.sizing.lora_bytes import legal_rank
from toolkit.sizing.micro_batch import ACCUMULATION, MICRO_BATCH, divisors
from toolkit.sizing.result import Remedy
from toolkit.sizing.tensor_parallel import split_facts

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Protocol

    from toolkit.config.run_config import RunConfig
    from toolkit.sizing.fit import Candidate, Fit

    class Attempt(Protocol):
        """A function that returns the best candidate for a changed run (``solve.best_candidate``).
        By default, ``world_size`` and ``device`` are those of the unchanged run.
        """

        def __call__(
            self, config: RunConfig, world_size: int = ..., device: Device | None = ...
        ) -> tuple[Candidate, Fit]: ...


# The costs of changes, from the least to the greatest harm.
NOTHING, TIME, PRECISION, ADAPTER, LENGTH, HARDWARE = range(6)
HARM_TEXTS = {
    NOTHING: "loses nothing",
    TIME: "costs time",
    PRECISION: "costs precision",
    ADAPTER: "makes the adapter smaller",
    LENGTH: "makes the texts shorter",
    HARDWARE: "needs more hardware",
}
_MIN_TEXT_TOKENS = 128  # completions and prompts are not shortened to fewer tokens
_MAX_COMBINED_CHANGES = 40
MAX_CARDS = 8  # the largest number of cards of one node over which a model is split
_ASSUMED_PROMPT_TOKENS = 1024  # tokens that are reserved for prompts of unknown length


@dataclass(frozen=True, slots=True)
class _Change:
    """A change of a run: ``settings`` are the values to set in the run file (by dotted keys),
    ``text`` describes the change, and ``harm`` says what it costs.
    """

    harm: int
    text: str
    settings: dict[str, Any] = field(default_factory=dict)

    def apply_to(self, config: RunConfig) -> RunConfig:
        """``config`` with the values of the change."""
        for key, value in self.settings.items():
            section, _, name = key.partition(".")
            if section == "grpo":
                config = replace(config, grpo=MappingProxyType({**config.grpo, name: value}))
            else:
                changed = replace(getattr(config, section), **{name: value})
                config = replace(config, **{section: changed})
        return config


def find_remedies(
    config: RunConfig, candidate: Candidate, missing: int, attempt: Attempt
) -> tuple[Remedy, ...]:
    """Return the changes of ``config`` that free memory. First come the changes that make the run
    fit, then those that are not enough. In both parts, the changes are sorted by harm. Changes with
    equal harm are sorted by the bytes that they free.

    ``candidate`` has the engine plan and the step plan that the sizer chose for ``config``.
    ``missing`` is the number of missing bytes. ``attempt`` is a function that chooses the
    best candidate for a changed run.
    """
    remedies = []
    for change in _possible_changes(candidate):
        still_missing = attempt(change.apply_to(config))[1].short_bytes
        if still_missing < missing:
            remedies.append(_to_remedy(change, missing, still_missing))
    remedies += _second_card(config, candidate, missing, attempt)
    remedies += _split_model(config, candidate, missing, attempt)
    remedies += _larger_card(config, candidate, missing, attempt)
    if not any(remedy.enough and remedy.harm <= ADAPTER for remedy in remedies):
        combined = _combine_changes(config, attempt)
        if combined is not None:
            remedies.append(
                _to_remedy(combined, missing, attempt(combined.apply_to(config))[1].short_bytes)
            )
    return tuple(
        sorted(remedies, key=lambda remedy: (not remedy.enough, remedy.harm, -remedy.frees_bytes))
    )


def _to_remedy(change: _Change, missing: int, still_missing: int) -> Remedy:
    return Remedy(
        change=change.text,
        frees_bytes=missing - still_missing,
        enough=still_missing <= 0,
        harm=change.harm,
        costs=HARM_TEXTS[change.harm],
        settings=tuple(change.settings.items()),
    )


def _combine_changes(config: RunConfig, attempt: Attempt) -> _Change | None:
    """Combine several changes into one change with which the run fits. The least harmful changes
    are added one by one until the run fits. Then the changes that turn out to be unnecessary are
    removed.

    Return None if all changes together are not enough, or if the run fits without changes.
    """
    settings: dict[str, Any] = {}
    changed, harms = config, dict[str, int]()
    candidate, fit = attempt(changed)
    for _ in range(_MAX_COMBINED_CHANGES):
        if fit.fits:
            break
        step = _least_harmful_change(changed, candidate, fit, attempt)
        if step is None:
            return None
        settings |= step.settings
        harms |= dict.fromkeys(step.settings, step.harm)
        changed = step.apply_to(changed)
        candidate, fit = attempt(changed)
    else:
        return None
    for group in _undo_groups(settings):
        remaining = {key: value for key, value in settings.items() if key not in group}
        if remaining and attempt(_Change(NOTHING, "", remaining).apply_to(config))[1].fits:
            settings = remaining
    text = " and ".join(
        f"{key.rpartition('.')[2]}: {str(value).lower() if isinstance(value, bool) else value}"
        for key, value in settings.items()
    )
    return _Change(max(harms[key] for key in settings), text, settings) if settings else None


def _undo_groups(settings: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return groups of keys, in the order in which ``_combine_changes`` tries to undo their
    changes. The first groups have one key each, beginning with the last change. The later groups
    have keys that must be changed together, such as the micro-batch and the accumulation.
    """
    batch = (f"grpo.{MICRO_BATCH}", f"grpo.{ACCUMULATION}")
    rank = ("lora.r", "model.max_lora_rank")
    lengths = ("model.max_seq_length", "grpo.max_completion_length", "grpo.max_prompt_length")
    joint_groups = [
        group for group in (batch, rank, lengths) if any(key in settings for key in group)
    ]
    single_keys = [(key,) for key in settings if not any(key in group for group in joint_groups)]
    return [*reversed(single_keys), *joint_groups]


def _least_harmful_change(
    config: RunConfig, candidate: Candidate, fit: Fit, attempt: Attempt
) -> _Change | None:
    """Return the least harmful change that frees memory. If several changes are equally harmful,
    return the one that frees most memory. Return None if no change frees memory.
    """
    by_harm: dict[int, list[_Change]] = {}
    for change in _possible_changes(candidate):
        by_harm.setdefault(change.harm, []).append(change)
    for harm in sorted(by_harm):
        tried = [
            (attempt(candidate_change.apply_to(config))[1].short_bytes, candidate_change)
            for candidate_change in by_harm[harm]
        ]
        still_missing, best = min(tried, key=lambda pair: pair[0])
        if still_missing < fit.short_bytes:
            return best
    return None


def _possible_changes(candidate: Candidate) -> Iterator[_Change]:
    yield from _length_changes(candidate)
    yield from _step_changes(candidate)
    yield from _rank_changes(candidate)
    if candidate.plan.on_gpu and candidate.work.uses_engine:
        yield from _engine_changes(candidate)
    yield from _format_changes(candidate)


def _length_changes(candidate: Candidate) -> Iterator[_Change]:
    config, work = candidate.config, candidate.work
    length = config.model.max_seq_length
    prompt = config.grpo.get("max_prompt_length")
    has_prompt_length = isinstance(prompt, int) and prompt > 0
    needed = (
        work.prompt_tokens + work.completion_tokens
        if has_prompt_length
        else work.completion_tokens + _ASSUMED_PROMPT_TOKENS
    )
    if needed < length:
        assumption = "" if has_prompt_length else f" (prompts of up to {_ASSUMED_PROMPT_TOKENS})"
        harm = NOTHING if has_prompt_length else LENGTH
        text = f"max_seq_length {length} -> {needed}{assumption}"
        yield _Change(harm, text, {"model.max_seq_length": needed})
    if work.completion_tokens >= 2 * _MIN_TEXT_TOKENS:
        half = work.completion_tokens // 2
        shorter = min(length, max(length - (work.completion_tokens - half), 64))
        yield _Change(
            LENGTH,
            f"max_completion_length {work.completion_tokens} -> {half} (max_seq_length {shorter})",
            {"grpo.max_completion_length": half, "model.max_seq_length": shorter},
        )
    if has_prompt_length and isinstance(prompt, int) and prompt >= 2 * _MIN_TEXT_TOKENS:
        half = prompt // 2
        shorter = max(min(length, half + work.completion_tokens), 64)
        yield _Change(
            LENGTH,
            f"max_prompt_length {prompt} -> {half} (max_seq_length {shorter})",
            {"grpo.max_prompt_length": half, "model.max_seq_length": shorter},
        )


def _step_changes(candidate: Candidate) -> Iterator[_Change]:
    micro, accumulation = candidate.step.micro_batch, candidate.step.accumulation
    if micro > 1:
        smaller = next(divisor for divisor in divisors(micro) if divisor <= micro // 2)
        accumulation_steps = accumulation * micro // smaller
        yield _Change(
            TIME,
            f"{MICRO_BATCH} {micro} -> {smaller} ({ACCUMULATION} {accumulation} -> "
            f"{accumulation_steps})",
            {f"grpo.{MICRO_BATCH}": smaller, f"grpo.{ACCUMULATION}": accumulation_steps},
        )
    if not candidate.step.checkpointing:
        text = "use_gradient_checkpointing: true"
        yield _Change(TIME, text, {"lora.use_gradient_checkpointing": True})


def _rank_changes(candidate: Candidate) -> Iterator[_Change]:
    lora = candidate.config.lora
    max_rank = candidate.plan.max_lora_rank
    if candidate.work.uses_engine and max_rank > legal_rank(lora.largest_rank):
        rank = legal_rank(lora.largest_rank)
        text = f"max_lora_rank {max_rank} -> {rank}"
        yield _Change(NOTHING, text, {"model.max_lora_rank": rank})
    lower = [rank for rank in LEGAL_RANKS if rank < lora.r]
    if lower and not lora.rank_pattern:
        rank = lower[-1]
        settings = {"lora.r": rank, "model.max_lora_rank": rank}
        yield _Change(ADAPTER, f"lora.r {lora.r} -> {rank}", settings)


def _engine_changes(candidate: Candidate) -> Iterator[_Change]:
    plan = candidate.plan
    flags = (
        (not plan.share_weights, NOTHING, "share_weights"),
        (not plan.sleep, TIME, "enable_sleep_mode"),
        (not plan.enforce_eager, TIME, "enforce_eager"),
        (
            not plan.float8_kv_cache and _supports(candidate, FLOAT8_NATIVE),
            PRECISION,
            "float8_kv_cache",
        ),
    )
    for possible, harm, name in flags:
        if possible:
            yield _Change(harm, f"{name}: true", {f"model.{name}": True})
    if plan.copies_bytes and candidate.config.model.dequantized_rollouts is not False:
        text = "dequantized_rollouts: false"
        yield _Change(TIME, text, {"model.dequantized_rollouts": False})
    tokens, sequences = plan.max_num_batched_tokens, plan.max_num_seqs
    if tokens >= max(1024, 2 * sequences):
        text = f"max_num_batched_tokens {tokens} -> {tokens // 2}"
        yield _Change(TIME, text, {"model.max_num_batched_tokens": tokens // 2})
    if sequences > 1:
        text = f"max_num_seqs {sequences} -> {sequences // 2}"
        yield _Change(TIME, text, {"model.max_num_seqs": sequences // 2})


def _format_changes(candidate: Candidate) -> Iterator[_Change]:
    is_split = (
        parallel.parallel_size(candidate.config.model.tensor_parallel_size) > 1
    )  # a split model cannot have 4-bit weights
    if candidate.plan.quantization is None and not is_split and _supports(candidate, FOUR_BIT):
        yield _Change(PRECISION, "load_in_4bit: true", {"model.load_in_4bit": True})


def _supports(candidate: Candidate, needed: tuple[int, int]) -> bool:
    return candidate.device is not None and candidate.device.compute_capability >= needed


def _second_card(
    config: RunConfig, candidate: Candidate, missing: int, attempt: Attempt
) -> list[Remedy]:
    """Return the remedy to use two cards of this kind, if it frees memory. Each card gets half of
    the micro-batch, so the number of completions per optimizer step does not change.
    """
    micro, accumulation = candidate.step.micro_batch, candidate.step.accumulation
    if candidate.device is None or candidate.step.world_size > 1 or micro % 2:
        return []
    change = _Change(
        HARDWARE,
        f"add a second card of this kind (--world-size 2), and set {MICRO_BATCH}: {micro // 2}",
        {f"grpo.{MICRO_BATCH}": micro // 2, f"grpo.{ACCUMULATION}": accumulation},
    )
    still_missing = attempt(change.apply_to(config), 2)[1].short_bytes
    if still_missing >= missing:
        return []
    return [replace(_to_remedy(change, missing, still_missing), world_size=2)]


def _split_model(
    config: RunConfig, candidate: Candidate, missing: int, attempt: Attempt
) -> list[Remedy]:
    """Return the remedy to set tensor_parallel_size to the smallest value with which the run fits.

    Values that need no further cards are tried first. If the run fits with none of them, the remedy
    is to add cards of the same kind. The number of completions per optimizer step does not change.
    """
    can_split = (
        candidate.work.uses_engine
        and candidate.plan.share_weights
        and candidate.plan.quantization is None
    )
    if candidate.device is None or not can_split:
        return []
    world, current = candidate.step.world_size, candidate.plan.tensor_parallel
    sizes = [
        n
        for n in parallel.possible_sizes(split_facts(candidate.unsplit_spec), MAX_CARDS)
        if not n & (n - 1)
    ]
    for size in (n for n in sizes if n > current and world % n == 0):
        micro, steps = candidate.step.micro_batch, candidate.step.accumulation * (size // current)
        settings = {
            "model.tensor_parallel_size": size,
            f"grpo.{MICRO_BATCH}": micro,
            f"grpo.{ACCUMULATION}": steps,
        }
        text = (
            f"tensor_parallel_size {current} -> {size} on the {world} cards "
            f"({ACCUMULATION} {steps})"
        )
        change = _Change(TIME, text, settings)
        still_missing = attempt(change.apply_to(config))[1].short_bytes
        if still_missing <= 0:
            return [_to_remedy(change, missing, still_missing)]
    for size in (n for n in sizes if n > current):
        cards = size * (world // current)
        text = f"{cards} cards (--world-size {cards}) with tensor_parallel_size {size}"
        change = _Change(HARDWARE, text, {"model.tensor_parallel_size": size})
        still_missing = attempt(change.apply_to(config), cards)[1].short_bytes
        if still_missing <= 0:
            return [replace(_to_remedy(change, missing, still_missing), world_size=cards)]
    return []


def _larger_card(
    config: RunConfig, candidate: Candidate, missing: int, attempt: Attempt
) -> list[Remedy]:
    """Return the remedy to use a card with more memory: the smallest card in the table of known
    cards on which the unchanged run fits.
    """
    if candidate.device is None:
        return []
    larger = sorted(
        (
            card
            for card in CARDS
            if card.cuda_bytes > candidate.device.cuda_total_bytes
            and card.source != "host"
            and "Laptop" not in card.name
            and build_problem(card.compute_capability, machine=card.machine) is None
        ),
        key=lambda card: (card.cuda_bytes, card.aliases[0]),
    )
    index = bisect_left(
        larger, True, key=lambda card: attempt(config, device=Device.from_card(card))[1].fits
    )
    if index >= len(larger):
        return []
    card = larger[index]
    still_missing = attempt(config, device=Device.from_card(card))[1].short_bytes
    size = format_bytes(card.cuda_bytes)
    change = _Change(HARDWARE, f"a larger card: {card.aliases[0]} ({size}) or one with more memory")
    return [replace(_to_remedy(change, missing, still_missing), card=card.aliases[0])]
