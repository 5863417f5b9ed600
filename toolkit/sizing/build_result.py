"""Build the result of sizing (``SizingResult``) from a candidate (an engine plan and a step plan)
and its memory terms (``Fit``). The result contains the sizes of the model, the engine and the
trainer, a value for every "auto", the predicted peaks, and all memory terms.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from toolkit.base.formatting import format_bytes
from toolkit.config.libraries import LEGAL_RANKS
from toolkit.sizing import engine_bytes as engines
from toolkit.sizing import kv_bytes, lora_bytes
from toolkit.sizing.dequantized import all_copies_bytes, available_copy_bytes
from toolkit.sizing.fit import REUSABLE_SHARE
from toolkit.sizing.micro_batch import is_auto
from toolkit.sizing.packs import passes_per_step, tokens_per_step
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
from toolkit.sizing.terms import Term, total_bytes
from toolkit.sizing.trainer_bytes import compute_bytes

if TYPE_CHECKING:
    from toolkit.sizing.device import Device
    from toolkit.sizing.fit import Candidate, Fit
    from toolkit.sizing.result import Remedy

STEPS_PER_UNIT = 1000  # the interval and the choice are rounded to 0.001
FINE_STEPS_PER_UNIT = (
    10**6
)  # used if no multiple of 0.001 lies between the exact ends of the interval


def build_result(
    candidate: Candidate,
    fit: Fit,
    *,
    largest_micro_batch: int,
    remedies: tuple[Remedy, ...] = (),
    longest_sequence: int | None = None,
) -> SizingResult:
    """Return the result for ``candidate``. ``largest_micro_batch`` is the largest micro-batch that
    fits. ``longest_sequence`` is the longest sequence that fits, as returned by
    ``longest_sequence.longest_fitting_sequence``.
    """
    interval, utilization = _interval(candidate, fit)
    cache_bytes = _cache_bytes(candidate, fit, utilization)
    terms = list(fit.terms)
    if candidate.work.uses_engine:
        sequences = cache_bytes // fit.kv_sequence_bytes if fit.kv_sequence_bytes else 0
        source = f"{sequences:,} sequences of {candidate.plan.max_model_len} tokens"
        first_other = next(
            index for index, term in enumerate(terms) if not term.name.startswith("engine.")
        )
        terms.insert(first_other, Term("engine.kv", cache_bytes, source))
    if candidate.device is not None:
        terms.insert(
            0, Term("context", candidate.device.context_bytes, "CUDA context of the process")
        )
    return SizingResult(
        device=_device_json(candidate.device),
        model=_model(candidate, fit),
        engine=_engine(candidate, fit, cache_bytes),
        trainer=_trainer(candidate, fit),
        peaks=_peaks(candidate, fit, cache_bytes),
        interval=interval,
        choice=_choice(candidate, fit, utilization, largest_micro_batch),
        terms=tuple(terms),
        remedies=remedies,
        short_bytes=fit.short_bytes,
        longest_sequence=longest_sequence,
    )


def _interval(candidate: Candidate, fit: Fit) -> tuple[Interval, float | None]:
    """Return the interval of gpu_memory_utilization, and the value that is used.

    The value is that of the run file. For "auto", it is the upper end of the interval, or None if
    the run does not fit. The lower end is rounded up, and the upper end is rounded down. Without a
    vLLM engine on a GPU, both ends and the value are None.
    """
    if candidate.device is None or not candidate.work.uses_engine:
        return Interval(
            min=None, max=None, binding_min=fit.binding_min, binding_max=fit.binding_max
        ), None
    total = candidate.device.cuda_total_bytes
    steps = STEPS_PER_UNIT
    if fit.fits and _rounded_up(fit.min_bytes, total, steps) > _rounded_down(
        fit.max_bytes, total, steps
    ):
        steps = FINE_STEPS_PER_UNIT
    low, high = _rounded_up(fit.min_bytes, total, steps), _rounded_down(fit.max_bytes, total, steps)
    interval = Interval(
        min=low,
        max=high,
        binding_min=fit.binding_min,
        binding_max=fit.binding_max,
        min_without_margin=_rounded_up(fit.min_bytes - fit.min_margin_bytes, total, steps),
        max_without_margin=_rounded_down(fit.max_bytes + fit.max_margin_bytes, total, steps),
    )
    configured = candidate.config.model.gpu_memory_utilization
    if configured != "auto":
        return interval, float(configured)
    return interval, high if fit.fits else None


def _rounded_up(used: int, total: int, steps: int) -> float:
    """Return ``used / total``, rounded up to a multiple of ``1 / steps``."""
    return math.ceil(used * steps / total) / steps


def _rounded_down(used: int, total: int, steps: int) -> float:
    """Return ``used / total``, rounded down to a multiple of ``1 / steps``; at least 0."""
    return math.floor(max(used, 0) * steps / total) / steps


def _cache_bytes(candidate: Candidate, fit: Fit, utilization: float | None) -> int:
    if fit.kv_bytes is not None:
        return fit.kv_bytes
    if candidate.device is None or utilization is None:
        return 0
    engine_bytes = int(utilization * candidate.device.cuda_total_bytes)
    return max(0, engine_bytes - (fit.min_bytes - fit.kv_sequence_bytes))


def _device_json(device: Device | None) -> dict[str, object] | None:
    if device is None:
        return None
    return {
        "name": device.name,
        "total_bytes": device.total_bytes,
        "cuda_total_bytes": device.cuda_total_bytes,
        "free_bytes": device.free_bytes,
        "context_bytes": device.context_bytes,
        "compute_capability": list(device.compute_capability),
        "here": device.is_local,
    }


def _peaks(candidate: Candidate, fit: Fit, cache_bytes: int) -> Peaks:
    """The predicted peak of torch's allocator in each phase, without margins. The CUDA context and
    the engine's runtime are not included.
    """
    allocator_terms = [
        term
        for term in fit.terms
        if not term.name.startswith("margin.") and term.name != "engine.runtime"
    ]
    always = total_bytes(allocator_terms, "always")
    asleep = cache_bytes if candidate.plan.sleep else 0
    rollout = always + cache_bytes + total_bytes(allocator_terms, "rollout")
    training = always + cache_bytes - asleep + total_bytes(allocator_terms, "training")
    margin = sum(term.nbytes for term in fit.terms if term.name.startswith("margin."))
    activations = total_bytes(allocator_terms, "rollout") - candidate.plan.copies_bytes
    margin += int(activations * (1 - REUSABLE_SHARE))
    return Peaks(
        rollout_bytes=rollout,
        training_bytes=training,
        torch_bytes=max(rollout, training),
        bound_bytes=max(rollout, training) + margin,
    )


def _model(candidate: Candidate, fit: Fit) -> ModelPart:
    spec, plan = candidate.spec, candidate.plan
    weights = next(term.nbytes for term in fit.terms if term.name.endswith(".weights"))
    return ModelPart(
        name=spec.name,
        architecture=spec.architecture,
        parameters=candidate.unsplit_spec.parameters,
        trainable_parameters=candidate.work.adapter_parameters(candidate.unsplit_spec),
        weight_bytes=weights,
        kv_bytes_per_token=kv_bytes.bytes_per_token(spec, engines.kv_element_bytes(plan)),
        layers=spec.layers,
        dtype=plan.dtype,
        quantization=weight_format
        if (weight_format := _weight_format(candidate)) != plan.dtype
        else None,
        margin=spec.margin,
        notes=(*spec.notes, *_notes(candidate, fit)),
    )


def _weight_format(candidate: Candidate) -> str:
    """Return the name of the number format of the weights in memory, such as ``bfloat16``."""
    if candidate.spec.sized_by_headers:
        return "as stored"
    return (
        candidate.plan.quantization.method if candidate.plan.quantization else candidate.plan.dtype
    )


def _copies_note(candidate: Candidate, fit: Fit) -> str | None:
    """Return a note that says why the engine makes 16-bit copies of only some of the 4-bit weights,
    or of none.

    Return None if the engine copies all of them, if model.dequantized_rollouts is not "auto", or if
    there is enough memory for all copies. In the last case, the run does not fit at the
    gpu_memory_utilization of the run file, and this is reported elsewhere.
    """
    copies, needed = candidate.plan.copies_bytes, all_copies_bytes(candidate.spec, candidate.plan)
    chosen_here = (
        candidate.config.model.dequantized_rollouts == "auto" and candidate.work.uses_engine
    )
    if not chosen_here or copies >= needed:
        return None
    available = available_copy_bytes(candidate, fit) + copies
    if available >= needed:
        return None  # the run does not fit at the utilization in the run file, which is reported
    outcome = f"copies of {format_bytes(copies)} are made" if copies else "no copies are made"
    return (
        f"16-bit copies of all 4-bit weights for rollouts would need {format_bytes(needed)}, but "
        f"only {format_bytes(max(available, 0))} are free beside the KV cache, so {outcome}"
    )


def _notes(candidate: Candidate, fit: Fit) -> list[str]:
    notes = [note] if (note := _copies_note(candidate, fit)) is not None else []
    experts = any(block.active_experts for block in candidate.spec.blocks)
    if experts and candidate.work.targets == candidate.spec.targets:
        notes.append(
            "in this mixture of experts the adapter is on the layers for which the engine has LoRA "
            f"slots: {', '.join(candidate.spec.targets)}"
        )
    if not candidate.work.adapter_parameters(candidate.spec):
        notes.append(
            "lora.target_modules names no layer of this model, so the sizes include no adapter"
        )
    if candidate.plan.tensor_parallel > 1 and candidate.work.uses_engine:
        notes.append(
            f"with tensor_parallel_size {candidate.plan.tensor_parallel}, all sizes are those of "
            "one card"
        )
    return notes


def _engine(candidate: Candidate, fit: Fit, cache_bytes: int) -> EnginePart:
    sizes = {term.name: term.nbytes for term in fit.terms}
    plan = candidate.plan
    default_elements = lora_bytes.engine_lora_elements(
        candidate.spec, plan.max_lora_rank, plan.max_loras
    )
    uses_engine = candidate.work.uses_engine
    ranks = LEGAL_RANKS if uses_engine else ()
    return EnginePart(
        lora_bytes=default_elements * compute_bytes(plan.dtype) if uses_engine else 0,
        lora_slots_bytes=sizes.get("engine.lora", 0),
        activation_bytes=sizes.get("engine.activations", 0),
        graph_bytes=sizes.get("engine.cuda_graphs", 0),
        fixed_bytes=sum(term.nbytes for term in fit.terms if term.name.startswith("engine.")),
        kv_sequence_bytes=fit.kv_sequence_bytes,
        kv_wanted_bytes=fit.kv_wanted_bytes,
        kv_bytes=cache_bytes,
        copies_bytes=plan.copies_bytes,
        copies_note=_copies_note(candidate, fit),
        ranks=tuple((rank, engines.slot_bytes(candidate.spec, plan, rank)) for rank in ranks),
    )


def _trainer(candidate: Candidate, fit: Fit) -> TrainerPart:
    trainer = [term for term in fit.terms if term.name.startswith("trainer.")]
    resident, step = total_bytes(trainer, "always"), total_bytes(trainer, "training")
    return TrainerPart(
        resident_bytes=resident,
        step_bytes=step,
        peak_bytes=resident + step,
        step_s_estimate=round(training_seconds(candidate), 3),
        packs=_packs(candidate),
    )


def _packs(candidate: Candidate) -> PackPart | None:
    budget, work = candidate.step.pack_tokens, candidate.work
    if budget is None:
        return None
    return PackPart(
        pack_tokens=budget,
        step_tokens=tokens_per_step(work, budget),
        padded_tokens=work.rollouts * work.sequence_tokens,
        passes=passes_per_step(work, budget),
        passes_half=passes_per_step(work, budget, share=0.5),
    )


def _dequantized_rollouts(candidate: Candidate) -> bool | int:
    """Return the value of ``model.dequantized_rollouts``. If 16-bit copies of all 4-bit layers fit,
    the value is True. If there are no copies, it is False. Otherwise, the value is the number of
    bytes that may be used for copies. The largest layers are copied first.
    """
    copies = candidate.plan.copies_bytes
    return copies if 0 < copies < all_copies_bytes(candidate.spec, candidate.plan) else copies > 0


def _choice(
    candidate: Candidate, fit: Fit, utilization: float | None, largest_micro_batch: int
) -> Choice:
    return Choice(
        gpu_memory_utilization=utilization,
        max_lora_rank=candidate.plan.max_lora_rank,
        max_num_seqs=candidate.plan.max_num_seqs,
        max_num_batched_tokens=candidate.plan.max_num_batched_tokens,
        gradient_checkpointing=candidate.step.checkpointing,
        per_device_train_batch_size=candidate.step.micro_batch,
        gradient_accumulation_steps=candidate.step.accumulation,
        largest_micro_batch=largest_micro_batch,
        enable_sleep_mode=candidate.plan.sleep,
        dtype=candidate.plan.dtype,
        fast_inference=candidate.work.uses_engine,
        kv_cache_bytes=fit.kv_bytes,
        dequantized_rollouts=_dequantized_rollouts(candidate),
        target_modules=candidate.work.targets,
        tensor_parallel_size=candidate.plan.tensor_parallel,
        # If the run file sets the micro-batch, the number of rows limits a pass, so no limit on
        # tokens is chosen.
        pack_tokens=candidate.step.pack_tokens if is_auto(candidate.config.grpo) else None,
    )
