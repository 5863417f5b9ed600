"""Build the SizingResult of a candidate and its fit: parts, choice, peaks, and the whole budget."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from toolkit.base.formatting import format_bytes
from toolkit.config.libraries import LEGAL_RANKS
from toolkit.sizing import engine_bytes as engines
from toolkit.sizing import kv_bytes, lora_bytes
from toolkit.sizing.dequantized import all_copies, room_for_copies
from toolkit.sizing.fit import RETURNED_SHARE
from toolkit.sizing.micro_batch import is_auto
from toolkit.sizing.packs import passes, step_tokens
from toolkit.sizing.result import (
    Choice,
    EnginePart,
    Interval,
    ModelPart,
    PackPart,
    Peaks,
    SizingResult,
    TrainerPart,
)
from toolkit.sizing.step_time import training_seconds
from toolkit.sizing.terms import Term, total
from toolkit.sizing.trainer_bytes import compute_bytes

if TYPE_CHECKING:
    from toolkit.sizing.device import Device
    from toolkit.sizing.fit import Case, Fit
    from toolkit.sizing.result import Remedy

STEPS = 1000  # the interval and the choice are rounded to 0.001


def assemble(
    case: Case,
    fit: Fit,
    *,
    largest: int,
    remedies: tuple[Remedy, ...] = (),
    longest: int | None = None,
) -> SizingResult:
    """The result of ``case``; ``largest`` is the largest micro-batch that fits, ``longest`` the
    longest sequence (``longest.longest_that_fits``).
    """
    interval, utilization = _interval(case, fit)
    kv_bytes = _kv_bytes(case, fit, utilization)
    terms = list(fit.terms)
    if case.work.uses_engine:
        sequences = kv_bytes // fit.kv_sequence_bytes if fit.kv_sequence_bytes else 0
        source = f"{sequences:,} sequences of {case.plan.max_model_len} tokens"
        at = next(index for index, term in enumerate(terms) if not term.term.startswith("engine."))
        terms.insert(at, Term("engine.kv", kv_bytes, source))
    if case.device is not None:
        terms.insert(0, Term("context", case.device.context_bytes, "CUDA context of the process"))
    return SizingResult(
        device=_device(case.device),
        model=_model(case, fit),
        engine=_engine(case, fit, kv_bytes),
        trainer=_trainer(case, fit),
        peaks=_peaks(case, fit, kv_bytes),
        interval=interval,
        choice=_choice(case, fit, utilization, largest),
        terms=tuple(terms),
        remedies=remedies,
        short_bytes=fit.short_bytes,
        longest_sequence=longest,
    )


def _interval(case: Case, fit: Fit) -> tuple[Interval, float | None]:
    """The interval, rounded inwards, and the choice: the written value, else the upper end."""
    if case.device is None or not case.work.uses_engine:
        return Interval(
            min=None, max=None, binding_min=fit.binding_min, binding_max=fit.binding_max
        ), None
    card = case.device.cuda_total_bytes
    low = math.ceil(fit.min_bytes * STEPS / card) / STEPS
    high = math.floor(max(fit.max_bytes, 0) * STEPS / card) / STEPS
    interval = Interval(
        min=low,
        max=high,
        binding_min=fit.binding_min,
        binding_max=fit.binding_max,
        min_without_margin=math.ceil((fit.min_bytes - fit.min_margin_bytes) * STEPS / card) / STEPS,
        max_without_margin=math.floor((fit.max_bytes + fit.max_margin_bytes) * STEPS / card)
        / STEPS,
    )
    written = case.config.model.gpu_memory_utilization
    if written != "auto":
        return interval, float(written)
    return interval, high if fit.fits else None


def _kv_bytes(case: Case, fit: Fit, utilization: float | None) -> int:
    if fit.kv_bytes is not None:
        return fit.kv_bytes
    if case.device is None or utilization is None:
        return 0
    taken = int(utilization * case.device.cuda_total_bytes)
    return max(0, taken - (fit.min_bytes - fit.kv_sequence_bytes))


def _device(device: Device | None) -> dict[str, object] | None:
    if device is None:
        return None
    return {
        "name": device.name,
        "total_bytes": device.total_bytes,
        "cuda_total_bytes": device.cuda_total_bytes,
        "free_bytes": device.free_bytes,
        "context_bytes": device.context_bytes,
        "compute_capability": list(device.compute_capability),
        "here": device.here,
    }


def _peaks(case: Case, fit: Fit, kv_bytes: int) -> Peaks:
    """The predicted peak of torch's allocator in each phase, without margins.

    It does not include the CUDA context and the engine's runtime.
    """
    counted = [
        term
        for term in fit.terms
        if not term.term.startswith("margin.") and term.term != "engine.runtime"
    ]
    always = total(counted, "always")
    asleep = kv_bytes if case.plan.sleep else 0
    rollout = always + kv_bytes + total(counted, "rollout")
    training = always + kv_bytes - asleep + total(counted, "training")
    margin = sum(term.bytes for term in fit.terms if term.term.startswith("margin."))
    activations = total(counted, "rollout") - case.plan.dequantized
    margin += int(activations * (1 - RETURNED_SHARE))
    return Peaks(
        rollout_bytes=rollout,
        training_bytes=training,
        torch_bytes=max(rollout, training),
        bound_bytes=max(rollout, training) + margin,
    )


def _model(case: Case, fit: Fit) -> ModelPart:
    spec, plan = case.spec, case.plan
    weights = next(term.bytes for term in fit.terms if term.term.endswith(".weights"))
    return ModelPart(
        name=spec.name,
        architecture=spec.architecture,
        parameters=case.whole.parameters,
        trainable_parameters=case.work.adapter_parameters(case.whole),
        weight_bytes=weights,
        kv_bytes_per_token=kv_bytes.bytes_per_token(spec, engines.kv_element_bytes(plan)),
        layers=spec.layers,
        dtype=plan.dtype,
        quantization=how if (how := _format(case)) != plan.dtype else None,
        margin=spec.margin,
        notes=(*spec.notes, *_notes(case, fit)),
    )


def _format(case: Case) -> str:
    """How the weights are stored in memory, as one word."""
    if case.spec.weights_by_headers:
        return "as stored"
    return case.plan.quantization.method if case.plan.quantization else case.plan.dtype


def _copies_note(case: Case, fit: Fit) -> str | None:
    """What becomes of the copies of 4-bit weights where not all of them are made by themselves."""
    copies, whole = case.plan.dequantized, all_copies(case.spec, case.plan)
    left_open = case.config.model.dequantized_rollouts == "auto" and case.work.uses_engine
    if not left_open or copies >= whole:
        return None
    left = room_for_copies(case, fit) + copies
    made = f"{format_bytes(copies)} of them are made" if copies else "none are made"
    return (
        f"4-bit weights: 16-bit copies for the rollouts would take {format_bytes(whole)}, and "
        f"{format_bytes(max(left, 0))} are left beside the KV cache; {made}"
    )


def _notes(case: Case, fit: Fit) -> list[str]:
    notes = [note] if (note := _copies_note(case, fit)) is not None else []
    experts = any(block.active_experts for block in case.spec.blocks)
    if experts and case.work.targets == case.spec.targets:
        notes.append(
            f"a mixture of experts: the adapter is on {', '.join(case.spec.targets)}, for which "
            "the engine has LoRA slots"
        )
    if not case.work.adapter_parameters(case.spec):
        notes.append("lora.target_modules names no layer of this model: no adapter is counted")
    if case.plan.tensor_parallel > 1 and case.work.uses_engine:
        notes.append(
            f"tensor_parallel_size {case.plan.tensor_parallel}: all bytes are those of one card"
        )
    return notes


def _engine(case: Case, fit: Fit, kv_bytes: int) -> EnginePart:
    sizes = {term.term: term.bytes for term in fit.terms}
    plan = case.plan
    everywhere = lora_bytes.engine_elements(case.spec, plan.max_lora_rank, plan.max_loras)
    uses = case.work.uses_engine
    ranks = LEGAL_RANKS if uses else ()
    return EnginePart(
        lora_bytes=everywhere * compute_bytes(plan.dtype) if uses else 0,
        lora_slots_bytes=sizes.get("engine.lora", 0),
        activation_bytes=sizes.get("engine.activations", 0),
        graph_bytes=sizes.get("engine.cuda_graphs", 0),
        fixed_bytes=sum(term.bytes for term in fit.terms if term.term.startswith("engine.")),
        kv_sequence_bytes=fit.kv_sequence_bytes,
        kv_wanted_bytes=fit.kv_wanted_bytes,
        kv_bytes=kv_bytes,
        copies_bytes=plan.dequantized,
        copies_note=_copies_note(case, fit),
        ranks=tuple((rank, engines.slot_bytes(case.spec, plan, rank)) for rank in ranks),
    )


def _trainer(case: Case, fit: Fit) -> TrainerPart:
    trainer = [term for term in fit.terms if term.term.startswith("trainer.")]
    resident, step = total(trainer, "always"), total(trainer, "training")
    return TrainerPart(
        resident_bytes=resident,
        step_bytes=step,
        peak_bytes=resident + step,
        step_s_estimate=round(training_seconds(case), 3),
        packs=_packs(case),
    )


def _packs(case: Case) -> PackPart | None:
    budget, work = case.step.pack_tokens, case.work
    if budget is None:
        return None
    return PackPart(
        pack_tokens=budget,
        step_tokens=step_tokens(work, budget),
        padded_tokens=work.rollouts * work.sequence_tokens,
        passes=passes(work, budget),
        passes_half=passes(work, budget, share=0.5),
    )


def _dequantized(case: Case) -> bool | int:
    """The value of model.dequantized_rollouts: all (True), the largest layers in so many bytes, or
    none.
    """
    copies = case.plan.dequantized
    return copies if 0 < copies < all_copies(case.spec, case.plan) else copies > 0


def _choice(case: Case, fit: Fit, utilization: float | None, largest: int) -> Choice:
    return Choice(
        gpu_memory_utilization=utilization,
        max_lora_rank=case.plan.max_lora_rank,
        max_num_seqs=case.plan.max_num_seqs,
        max_num_batched_tokens=case.plan.max_num_batched_tokens,
        gradient_checkpointing=case.step.checkpointing,
        per_device_train_batch_size=case.step.micro_batch,
        gradient_accumulation_steps=case.step.accumulation,
        largest_micro_batch=largest,
        enable_sleep_mode=case.plan.sleep,
        dtype=case.plan.dtype,
        fast_inference=case.work.uses_engine,
        kv_cache_bytes=fit.kv_bytes,
        dequantized_rollouts=_dequantized(case),
        target_modules=case.work.targets,
        tensor_parallel_size=case.plan.tensor_parallel,
        # Where rows are written, they bound a pass, at the width of what was sampled.
        pack_tokens=case.step.pack_tokens if is_auto(case.config.grpo) else None,
    )
