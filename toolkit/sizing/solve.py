"""``solve``: from a run file, a model and a card to the interval of gpu_memory_utilization, the
choice, and the budget.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from typing import TYPE_CHECKING

from toolkit.sizing.assemble import assemble
from toolkit.sizing.batch import divisors
from toolkit.sizing.fit import Case, evaluate
from toolkit.sizing.plan import plan_engine
from toolkit.sizing.remedies import remedies_for
from toolkit.sizing.spec import read_spec
from toolkit.sizing.trainer import StepPlan, adapter_bytes, compute_bytes
from toolkit.sizing.workload import read_workload

if TYPE_CHECKING:
    from toolkit.config.model import RunConfig
    from toolkit.sizing.device import Device
    from toolkit.sizing.fit import Fit
    from toolkit.sizing.model import ModelSpec
    from toolkit.sizing.plan import EnginePlan
    from toolkit.sizing.result import SizingResult
    from toolkit.sizing.workload import Workload


def solve(
    config: RunConfig, spec: ModelSpec, device: Device | None, *, world_size: int = 1
) -> SizingResult:
    """Size the run; ``device`` None is the CPU. An empty interval is a result with ``feasible``
    False and priced remedies.

    Raises ConfigError for numbers that no run can have (a rank above the engine's largest).
    """
    case, fit = best_case(config, spec, device, world_size)
    if fit.short <= 0:
        return assemble(case, fit, largest=_largest_micro_batch(case))
    remedies = remedies_for(
        case, fit.short, lambda changed: best_case(changed, spec, device, world_size)[1].short
    )
    return assemble(case, fit, largest=_largest_micro_batch(case), remedies=remedies)


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
    """The first candidate that suits (``Fit.holds_rollout``, and what is written); else, of the
    smallest micro-batch, the one that fits with the widest interval; else the nearest to fitting.

    The largest micro-batch comes first. With it: as planned, with checkpointing, then the same with
    KV sleep.
    """
    if config.lora.target_modules == "auto":
        config = replace(config, lora=replace(config.lora, target_modules=spec.targets))
    work = read_workload(config, device, world_size=world_size)
    plan = plan_engine(config, spec, work, device)
    tried: dict[int, list[tuple[Case, Fit]]] = {}

    def first(micro: int) -> tuple[Case, Fit] | None:
        found = tried.setdefault(micro, [])
        for chosen in _sleeps(config, plan, work):
            for step in _steps(config, work, chosen, micro, world_size):
                case = Case(
                    config=config, spec=spec, device=device, work=work, plan=chosen, step=step
                )
                found.append((case, evaluate(case)))
                if _suits(*found[-1]):
                    return found[-1]
        return None

    micros = work.micro_batches
    if best := first(micros[0]):
        return best
    # A smaller one of the rest never needs more.
    place = bisect_left(micros, True, lo=1, key=lambda micro: first(micro) is not None)
    if place < len(micros):
        return next(pair for pair in tried[micros[place]] if _suits(*pair))
    fitting = [pair for pair in tried[micros[-1]] if pair[1].short <= 0]
    if fitting:
        return max(fitting, key=lambda pair: pair[1].most - pair[1].least)
    return min(tried[micros[-1]], key=lambda pair: pair[1].short)


def _suits(case: Case, fit: Fit) -> bool:
    """Whether the run fits, the whole rollout in its KV cache, at the utilization as written."""
    written = case.config.model.gpu_memory_utilization
    if written == "auto" or case.device is None or not case.work.uses_engine:
        return fit.holds_rollout
    return fit.holds_rollout and written * case.device.cuda_total_bytes <= fit.most


def _sleeps(config: RunConfig, plan: EnginePlan, work: Workload) -> list[EnginePlan]:
    if config.model.enable_sleep_mode == "auto" and plan.on_gpu and work.uses_engine:
        return [plan.with_sleep(False), plan.with_sleep(True)]
    return [plan]


def _steps(
    config: RunConfig, work: Workload, plan: EnginePlan, micro: int, world_size: int
) -> list[StepPlan]:
    written = config.lora.use_gradient_checkpointing
    return [
        StepPlan(
            micro_batch=micro,
            accumulation=work.accumulation * work.micro_batch // micro,
            checkpointing=mode,
            compute_bytes=compute_bytes(plan.dtype),
            adapter_bytes=adapter_bytes(plan.quantization),
            own_weights=not work.uses_engine or not plan.share_weights,
            world_size=world_size,
        )
        for mode in ([False, True] if written == "auto" else [written])
    ]


def _largest_micro_batch(case: Case) -> int:
    """The largest micro-batch that cuts the generation batch as it is evenly; 0 if not even 1 fits.

    What fits holds every sequence of a rollout in the KV cache, as the choice does.
    """

    def fits(micro: int) -> bool:
        accumulation = max(case.work.accumulation * case.work.micro_batch // micro, 1)
        step = replace(case.step, micro_batch=micro, accumulation=accumulation)
        return evaluate(replace(case, step=step)).holds_rollout

    micros = divisors(case.work.rollouts)
    place = bisect_left(micros, True, key=fits)
    return micros[place] if place < len(micros) else 0
