"""``solve``: from a run file, a model and a card to the interval of gpu_memory_utilization, the
choice, and the budget.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from toolkit.sizing import engine as engines
from toolkit.sizing import kv, lora
from toolkit.sizing.fit import Case, evaluate
from toolkit.sizing.plan import plan_engine
from toolkit.sizing.remedies import remedies_for
from toolkit.sizing.result import (
    Choice,
    EnginePart,
    Interval,
    ModelPart,
    SizingResult,
    TrainerPart,
)
from toolkit.sizing.spec import read_spec
from toolkit.sizing.terms import Term, total
from toolkit.sizing.trainer import StepPlan, compute_bytes
from toolkit.sizing.workload import read_workload

if TYPE_CHECKING:
    from toolkit.config.model import RunConfig
    from toolkit.sizing.device import Device
    from toolkit.sizing.fit import Fit
    from toolkit.sizing.model import ModelSpec
    from toolkit.sizing.plan import EnginePlan
    from toolkit.sizing.result import Remedy
    from toolkit.sizing.workload import Workload

STEPS = 1000  # the interval and the choice are told to 0.001


def solve(
    config: RunConfig, spec: ModelSpec, device: Device | None, *, world_size: int = 1
) -> SizingResult:
    """Size the run; ``device`` None is the CPU. An empty interval is a result with ``feasible``
    False and priced remedies.

    Raises ConfigError for numbers that no run can have (a rank above the engine's largest).
    """
    case, fit = best_case(config, spec, device, world_size)
    remedies: tuple[Remedy, ...] = ()
    if fit.short > 0:
        remedies = remedies_for(
            case,
            fit.short,
            lambda changed: best_case(changed, spec, device, world_size)[1].short,
        )
    return _result(case, fit, remedies)


def resolve(
    config: RunConfig, device: Device | None, *, world_size: int = 1
) -> tuple[RunConfig, SizingResult]:
    """Read the model, solve, and fill every "auto". Raises ConfigError with the priced list where
    the run does not fit.
    """
    spec = read_spec(config.model.model_name, config.model.revision)
    result = solve(config, spec, device, world_size=world_size)
    return result.apply(config), result


def best_case(
    config: RunConfig, spec: ModelSpec, device: Device | None, world_size: int
) -> tuple[Case, Fit]:
    """The first candidate that holds a whole rollout in its KV cache; else the first that fits;
    else the nearest to fitting.

    Candidates in order: as planned, with checkpointing, smaller micro-batches, then all of these
    with KV sleep.
    """
    work = read_workload(config, world_size=world_size)
    plan = plan_engine(config, spec, work, device)
    tried: list[tuple[Case, Fit]] = []
    for chosen in _sleeps(config, plan, work):
        for step in _steps(config, work, chosen, world_size):
            case = Case(config=config, spec=spec, device=device, work=work, plan=chosen, step=step)
            fit = evaluate(case)
            if fit.holds_rollout:
                return case, fit
            tried.append((case, fit))
    fitting = [pair for pair in tried if pair[1].short <= 0]
    if fitting:
        return max(fitting, key=lambda pair: pair[1].most - pair[1].least)
    return min(tried, key=lambda pair: pair[1].short)


def _sleeps(config: RunConfig, plan: EnginePlan, work: Workload) -> list[EnginePlan]:
    if config.model.enable_sleep_mode == "auto" and plan.on_gpu and work.uses_engine:
        return [plan.with_sleep(False), plan.with_sleep(True)]
    return [plan]


def _steps(config: RunConfig, work: Workload, plan: EnginePlan, world_size: int) -> list[StepPlan]:
    written = config.lora.use_gradient_checkpointing
    modes = [False, True] if written == "auto" else [written]
    micro_batches = [work.micro_batch]
    if config.grpo.get("per_device_train_batch_size") == "auto":
        while micro_batches[-1] % 2 == 0:
            micro_batches.append(micro_batches[-1] // 2)
    return [
        StepPlan(
            micro_batch=micro,
            accumulation=work.accumulation * work.micro_batch // micro,
            checkpointing=mode,
            compute_bytes=compute_bytes(plan.dtype),
            own_weights=not work.uses_engine or not plan.share_weights,
            world_size=world_size,
        )
        for micro in micro_batches
        for mode in modes
    ]


def _result(case: Case, fit: Fit, remedies: tuple[Remedy, ...]) -> SizingResult:
    interval, utilization = _interval(case, fit)
    kv_bytes = _kv_bytes(case, fit, utilization)
    terms = list(fit.terms)
    if case.work.uses_engine:
        sequences = kv_bytes // fit.sequence if fit.sequence else 0
        source = f"{sequences:,} sequences of {case.plan.max_model_len} tokens"
        at = next(index for index, term in enumerate(terms) if not term.term.startswith("engine."))
        terms.insert(at, Term("engine.kv", kv_bytes, source))
    if case.device is not None:
        terms.insert(0, Term("context", case.device.context_bytes, "CUDA context of the process"))
    return SizingResult(
        device=_device(case.device),
        model=_model(case),
        engine=_engine(case, fit, kv_bytes),
        trainer=_trainer(fit),
        interval=interval,
        choice=_choice(case, fit, utilization),
        terms=tuple(terms),
        remedies=remedies,
        short_bytes=fit.short,
    )


def _interval(case: Case, fit: Fit) -> tuple[Interval, float | None]:
    """The interval rounded inwards, and the choice: the written value, else the upper end."""
    if case.device is None or not case.work.uses_engine:
        return Interval(
            min=None, max=None, binding_min=fit.binding_min, binding_max=fit.binding_max
        ), None
    card = case.device.cuda_total_bytes
    low = math.ceil(fit.least * STEPS / card) / STEPS
    high = math.floor(max(fit.most, 0) * STEPS / card) / STEPS
    interval = Interval(min=low, max=high, binding_min=fit.binding_min, binding_max=fit.binding_max)
    written = case.config.model.gpu_memory_utilization
    if written != "auto":
        return interval, float(written)
    return interval, high if fit.short <= 0 else None


def _kv_bytes(case: Case, fit: Fit, utilization: float | None) -> int:
    if fit.kv is not None:
        return fit.kv
    if case.device is None or utilization is None:
        return 0
    taken = int(utilization * case.device.cuda_total_bytes)
    return max(0, taken - (fit.least - fit.sequence))


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


def _model(case: Case) -> ModelPart:
    spec, plan = case.spec, case.plan
    weights = next(term.bytes for term in evaluate(case).terms if term.term.endswith(".weights"))
    return ModelPart(
        name=spec.name,
        architecture=spec.architecture,
        parameters=spec.parameters,
        trainable_parameters=lora.adapter_parameters(spec, case.work.rank, case.work.targets),
        weight_bytes=weights,
        kv_bytes_per_token=kv.bytes_per_token(spec, engines.kv_element_bytes(plan)),
        layers=spec.layers,
        dtype=plan.dtype,
        quantization=plan.quantization.method if plan.quantization else None,
        margin=spec.margin,
        notes=spec.notes,
    )


def _engine(case: Case, fit: Fit, kv_bytes: int) -> EnginePart:
    sizes = {term.term: term.bytes for term in fit.terms}
    width = compute_bytes(case.plan.dtype)
    return EnginePart(
        lora_bytes=sizes.get("engine.lora", 0),
        activation_bytes=sizes.get("engine.activations", 0),
        graph_bytes=sizes.get("engine.cuda_graphs", 0),
        fixed_bytes=sum(term.bytes for term in fit.terms if term.term.startswith("engine.")),
        kv_sequence_bytes=fit.sequence,
        kv_wanted_bytes=fit.wanted,
        kv_bytes=kv_bytes,
        ranks=tuple(
            (rank, lora.engine_elements(case.spec, rank, case.plan.max_loras) * width)
            for rank in lora.LEGAL_RANKS
        )
        if case.work.uses_engine
        else (),
    )


def _trainer(fit: Fit) -> TrainerPart:
    trainer = [term for term in fit.terms if term.term.startswith("trainer.")]
    resident, step = total(trainer, "always"), total(trainer, "training")
    return TrainerPart(resident_bytes=resident, step_bytes=step, peak_bytes=resident + step)


def _choice(case: Case, fit: Fit, utilization: float | None) -> Choice:
    return Choice(
        gpu_memory_utilization=utilization,
        max_lora_rank=case.plan.max_lora_rank,
        max_num_seqs=case.plan.max_num_seqs,
        max_num_batched_tokens=case.plan.max_num_batched_tokens,
        gradient_checkpointing=case.step.checkpointing,
        per_device_train_batch_size=case.step.micro_batch,
        gradient_accumulation_steps=case.step.accumulation,
        enable_sleep_mode=case.plan.sleep,
        dtype=case.plan.dtype,
        fast_inference=case.work.uses_engine,
        kv_cache_bytes=fit.kv,
    )
