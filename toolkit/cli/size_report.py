"""The output of ``envcheck size`` as text: the interval of gpu_memory_utilization, the chosen
values, and the memory budget with a bar for each phase of a step.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from toolkit.base.formatting import GIB, format_bytes, format_parameters
from toolkit.cli.render import format_table, styled, terminal_width, wrap_text
from toolkit.config.engine_settings import SIZED_OPTIONS

if TYPE_CHECKING:
    from toolkit.config.run_config import LoraSection, ModelSection, RunConfig
    from toolkit.sizing import SizingResult
    from toolkit.sizing.terms import Term

PHASE_NAMES = {"always": "always", "rollout": "rollouts", "training": "training"}
# Each row: a letter of the bar, its meaning, and prefixes of names of terms. A term gets the letter
# of the first row with a matching prefix.
BAR_LETTERS = (
    ("C", "context", ("context",)),
    ("W", "weights", ("engine.weights", "trainer.weights")),
    ("L", "LoRA slots", ("engine.lora",)),
    ("K", "KV cache", ("engine.kv", "rollout.kv")),
    ("A", "rollout activations", ("engine.activations", "rollout.logits")),
    ("E", "rest of the engine", ("engine.",)),
    ("O", "adapter and optimizer", ("trainer.adapter", "trainer.reference", "trainer.optimizer")),
    ("T", "training step", ("trainer.",)),
    ("m", "margins", ("margin.",)),
)
OTHER_BAR_LETTERS = (
    ("x", "used by other processes"),
    (".", "free"),
    ("!", "more than the card has"),
)


def format_report(result: SizingResult, config: RunConfig) -> str:
    """Return the output of ``envcheck size`` as text."""
    parts = [
        _head(result),
        _interval(result, config),
        _choice_table(result, config),
        _budget_table(result),
    ]
    parts += [_bars(result), _lora_slot_sizes(result), _peak_line(result)]
    if result.model.notes:
        notes = [wrap_text(note, first="note: ", indent="      ") for note in result.model.notes]
        parts.append("\n".join(notes))
    if result.remedies:
        lines = [f"  {remedy}" for remedy in result.remedies]
        enough = any(remedy.enough for remedy in result.remedies)
        order = (
            "changes that are enough alone come first, then"
            if enough
            else "no single change is enough;"
        )
        head = f"what each change would free ({order} the least harmful come first):"
        parts.append("\n".join([head, *lines]))
    return "\n\n".join(part for part in parts if part)


def _head(result: SizingResult) -> str:
    model = result.model
    weights_text = f"{model.quantization or model.dtype} {format_bytes(model.weight_bytes)}"
    cards = result.choice.tensor_parallel_size
    per_card = f" on each of {cards} cards" if cards > 1 else ""
    lines = [
        f"model   {model.name} ({model.architecture}): {format_parameters(model.parameters)} "
        f"parameters, {weights_text}, "
        f"KV {format_bytes(model.kv_bytes_per_token)} per token{per_card}",
    ]
    if model.margin:
        lines.append(
            f"margin  {model.margin:.0%} more memory is kept free, because the sizer does not know "
            "this model exactly"
        )
    if result.device is None:
        lines.append("device  the CPU (use --gpu NAME for a card)")
    else:
        device = result.device
        major, minor = device["compute_capability"]
        lines.append(
            f"device  {device['name']}: {format_bytes(device['cuda_total_bytes'])} for CUDA, "
            f"{format_bytes(device['free_bytes'])} free, capability {major}.{minor}"
            + ("" if device["here"] else " (from the table of cards)")
        )
    return "\n".join(wrap_text(line, indent=" " * 8) for line in lines)


def _interval(result: SizingResult, config: RunConfig) -> str:
    interval, choice = result.interval, result.choice
    if interval.min is None or interval.max is None:
        if result.feasible:
            most = format_bytes(result.peaks.bound_bytes)
            return f"fits: needs at most {most}; the largest term is {interval.binding_min}"
        missing = format_bytes(result.short_bytes)
        return styled(f"does not fit: {missing} are missing", "red", bold=True)
    if not result.feasible:
        first = f"gpu_memory_utilization: no value is possible, {format_bytes(result.short_bytes)}"
        head = styled(f"{first} are missing", "red", bold=True)
    else:
        written = config.model.gpu_memory_utilization
        value = choice.gpu_memory_utilization if written == "auto" else written
        how = "chosen" if written == "auto" else "written"
        head = (
            f"gpu_memory_utilization from {interval.min:.3f} to {interval.max:.3f}, {how} "
            + styled(f"{value:.3f}", bold=True)
        )
    return "\n".join(
        [
            head,
            f"  at least {interval.min:.3f}: {interval.binding_min}",
            f"  at most  {interval.max:.3f}: {interval.binding_max}",
        ]
    )


def _choice_table(result: SizingResult, config: RunConfig) -> str:
    choice = result.choice
    micro, accumulation = choice.per_device_train_batch_size, choice.gradient_accumulation_steps
    rows = [
        ["lora.r", str(config.lora.r), f"{result.model.trainable_parameters:,} parameters"],
        [
            "micro-batch x accumulation",
            f"{micro} x {accumulation}",
            "chosen"
            if config.grpo.get("per_device_train_batch_size") == "auto"
            else f"largest that fits: {choice.largest_micro_batch or 'none'}",
        ],
        *_pack_rows(result, config),
        _choice_row("lora.target_modules", _join_targets(choice.target_modules), config.lora),
        _choice_row("lora.use_gradient_checkpointing", choice.gradient_checkpointing, config.lora),
    ]
    if choice.fast_inference:
        # gpu_memory_utilization is printed above the table, with its interval
        names = [name for name in SIZED_OPTIONS if name != "gpu_memory_utilization"]
        rows += [
            _choice_row(f"model.{name}", getattr(choice, name), config.model) for name in names
        ]
    rows.append(_choice_row("model.dtype", choice.dtype, config.model))
    rows.append(_choice_row("model.fast_inference", choice.fast_inference, config.model))
    if choice.kv_cache_bytes is not None:
        rows.append(["KV cache of the CPU engine", format_bytes(choice.kv_cache_bytes), ""])
    return format_table(["choice", "value", ""], rows)


def _pack_rows(result: SizingResult, config: RunConfig) -> list[list[str]]:
    packs = result.trainer.packs
    if packs is None:
        return []
    written = config.runtime.pack_tokens
    return [
        [
            "runtime.pack_tokens",
            f"{packs.pack_tokens:,}",
            "written"
            if written != "auto"
            else "chosen"
            if result.choice.pack_tokens is not None
            else "as many as a micro-batch of full length",
        ],
        [
            "training passes of a step",
            f"{packs.passes} at full length, {packs.passes_half} at half",
            f"{packs.step_tokens:,} tokens, padded {packs.padded_tokens:,}",
        ],
    ]


def _choice_row(name: str, value: object, section: ModelSection | LoraSection) -> list[str]:
    written = getattr(section, name.rpartition(".")[2])
    shown = str(value).lower() if isinstance(value, bool) else str(value)
    if written == "auto":
        return [name, shown, "chosen"]
    usual = {item.name: item.default for item in fields(section)}[name.rpartition(".")[2]]
    return [name, shown, "the default" if written == usual else "written"]


def _join_targets(targets: tuple[str, ...] | str) -> str:
    return targets if isinstance(targets, str) else ", ".join(targets)


def _budget_table(result: SizingResult) -> str:
    total_bytes = result.device["cuda_total_bytes"] if result.device else None
    rows = [
        [
            term.name,
            format_bytes(term.nbytes),
            f"{term.nbytes / total_bytes:.1%}" if total_bytes else "",
            PHASE_NAMES[term.phase],
            term.source,
        ]
        for term in result.terms
        if term.nbytes
    ]
    return format_table(["budget", "bytes", "of card", "when", "from"], rows, right=(1, 2))


def _bars(result: SizingResult) -> str:
    """Return a bar for each phase (rollouts, training), and a legend of the letters in the bars.

    Each character of a bar stands for the same number of bytes.
    """
    if result.device is None:
        return ""
    total_bytes = int(result.device["cuda_total_bytes"])
    lines: list[str] = []
    seen: set[str] = set()
    for phase in ("rollout", "training"):
        asleep = phase == "training" and result.choice.enable_sleep_mode
        terms = [
            term
            for term in result.terms
            if term.phase in ("always", phase) and not (asleep and term.name == "engine.kv")
        ]
        taken_bytes = sum(term.nbytes for term in terms) + (
            total_bytes - min(int(result.device["free_bytes"]), total_bytes)
        )
        bar = _bar(terms, total_bytes, int(result.device["free_bytes"]))
        seen.update(bar)
        used = f"{taken_bytes / GIB:.1f} of {total_bytes / GIB:.1f} GiB"
        lines.append(f"{PHASE_NAMES[phase]:<9}[{bar}] {used}{' KV freed' if asleep else ''}")
    legend = [f"{letter} {meaning}" for letter, meaning, _ in BAR_LETTERS if letter in seen]
    legend += [f"{letter} {meaning}" for letter, meaning in OTHER_BAR_LETTERS if letter in seen]
    indent = " " * 9
    return "\n".join([*lines, wrap_text(", ".join(legend), first=indent, indent=indent)])


def _bar(terms: list[Term], total_bytes: int, free_bytes: int) -> str:
    width = min(terminal_width(), 120) - 36
    sizes: dict[str, int] = {}
    if free_bytes < total_bytes:
        sizes["x"] = total_bytes - free_bytes
    for letter, _, _ in BAR_LETTERS:
        sizes[letter] = sum(term.nbytes for term in terms if _letter(term.name) == letter)
    taken_bytes = sum(sizes.values())
    cells = _letter_counts(
        sizes, min(taken_bytes, total_bytes), width * min(taken_bytes, total_bytes) // total_bytes
    )
    bar = "".join(letter * cells[letter] for letter in sizes)
    if taken_bytes > total_bytes:
        return bar[: width - 1].ljust(width - 1, ".") + "!"
    return bar + "." * (width - len(bar))


def _letter_counts(sizes: dict[str, int], bar_bytes: int, max_letters: int) -> dict[str, int]:
    """Return how many letters each part of a bar gets. ``sizes`` has the bytes of each part. The
    letters are proportional to the bytes.

    The bar has ``max_letters`` letters, which stand for ``bar_bytes`` bytes. A part below 0.1% of
    ``bar_bytes`` gets no letter. Every other part gets at least one letter. If the sum of the
    letters is then above ``max_letters``, the longest parts are shortened.
    """
    total = sum(sizes.values())
    shown = {letter: nbytes for letter, nbytes in sizes.items() if nbytes * 1000 > bar_bytes}
    max_letters = max(max_letters, len(shown))
    counts = dict.fromkeys(sizes, 0)
    counts |= {letter: max(1, nbytes * max_letters // total) for letter, nbytes in shown.items()}
    while counts and sum(counts.values()) > max_letters:
        counts[max(counts, key=lambda letter: counts[letter])] -= 1
    while shown and sum(counts.values()) < max_letters:
        lacks = {letter: sizes[letter] * max_letters / total - counts[letter] for letter in shown}
        counts[max(lacks, key=lambda letter: lacks[letter])] += 1
    return counts


def _letter(name: str) -> str:
    return next(letter for letter, _, names in BAR_LETTERS if name.startswith(names))


def _lora_slot_sizes(result: SizingResult) -> str:
    if not result.engine.ranks:
        return ""
    chosen = result.choice.max_lora_rank
    sizes = [
        f"{rank}{'*' if rank == chosen else ''}: {format_bytes(nbytes)}"
        for rank, nbytes in result.engine.ranks
    ]
    listed = wrap_text(", ".join(sizes), first="  ", indent="  ")
    return "memory of the engine's LoRA slots by max_lora_rank (* the chosen rank)\n" + listed


def _peak_line(result: SizingResult) -> str:
    peaks = result.peaks
    return wrap_text(
        f"torch's peak: {format_bytes(peaks.torch_bytes)} predicted "
        f"(rollouts {format_bytes(peaks.rollout_bytes)}, "
        f"training {format_bytes(peaks.training_bytes)}), "
        f"at most {format_bytes(peaks.bound_bytes)}"
    )
