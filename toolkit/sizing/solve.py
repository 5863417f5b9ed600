"""``solve`` computes the interval of gpu_memory_utilization, the choice and the budget of a run
file, a model and a card.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from functools import partial
from itertools import product
from typing import TYPE_CHECKING

from toolkit.base.errors import ConfigError
from toolkit.config import parallel
from toolkit.config.resolved import resolve_run
from toolkit.config.trl_names import LIGER, installed
from toolkit.sizing.assemble import assemble
from toolkit.sizing.dequantized import best_copies, written_copies
from toolkit.sizing.device import situation_of, smallest
from toolkit.sizing.engine_bytes import kv_sequence_bytes
from toolkit.sizing.engine_plan import plan_engine
from toolkit.sizing.fit import Case, evaluate
from toolkit.sizing.longest import longest_that_fits
from toolkit.sizing.micro_batch import batch_of, count, divisors
from toolkit.sizing.packs import budgets, passes, uses_packs, whole_tokens
from toolkit.sizing.remedies import remedies_for
from toolkit.sizing.spec import read_spec
from toolkit.sizing.split import facts_of, one_card
from toolkit.sizing.step_time import added_seconds, training_seconds
from toolkit.sizing.trainer_bytes import compute_bytes, is_packed
from toolkit.sizing.workload import StepPlan, read_workload

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from toolkit.config.run_config import RunConfig
    from toolkit.sizing.device import Device
    from toolkit.sizing.engine_plan import EnginePlan
    from toolkit.sizing.fit import Fit
    from toolkit.sizing.model_blocks import ModelSpec
    from toolkit.sizing.result import SizingResult
    from toolkit.sizing.workload import Checkpointing, Workload


def solve(
    config: RunConfig, spec: ModelSpec, device: Device | None, *, world_size: int = 1
) -> SizingResult:
    """Size the run; ``device`` None is the CPU.

    If the interval is empty, the result has ``feasible`` False and a list of remedies. Raises
    ConfigError for impossible numbers (a rank above the engine's largest).
    """
    case, fit = best_case(config, spec, device, world_size)
    if fit.fits:
        return assemble(case, fit, largest=_largest_micro_batch(case))

    def attempt(
        config: RunConfig, world_size: int = world_size, device: Device | None = device
    ) -> tuple[Case, Fit]:
        return best_case(config, spec, device, world_size)

    remedies = remedies_for(config, case, fit.short_bytes, attempt)
    longest = longest_that_fits(config, case, lambda one: attempt(one)[1])
    largest = _largest_micro_batch(case)
    return assemble(case, fit, largest=largest, remedies=remedies, longest=longest)


def resolve(
    config: RunConfig, device: Device | None, *, world_size: int = 1
) -> tuple[RunConfig, SizingResult]:
    """Read the model, solve, and replace every "auto". Raises ConfigError with the list of remedies
    if the run does not fit.
    """
    spec = read_spec(config.model.model_name, config.model.revision)
    result = solve(config, spec, device, world_size=world_size)
    return result.apply(config), result


def resolve_for_all(
    config: RunConfig, devices: Sequence[Device | None], *, world_size: int
) -> tuple[RunConfig, SizingResult, Device | None]:
    """``resolve`` for a run whose processes have ``devices``: the same values for all, for the
    device with the least free memory. Also returns that device.

    Raises:
        ConfigError: the run does not fit on one of them, or only some processes have a GPU.
    """
    device = smallest(devices)
    resolved, sizing = resolve(config, device, world_size=world_size)
    for other in devices:
        # This GPU may have more memory in total but less of it free: the share chosen for the
        # smallest may be too much.
        if device is not None and other is not None and other.total_bytes != device.total_bytes:
            resolve(resolved, other, world_size=world_size)
    return resolved, sizing, device


def best_case(
    config: RunConfig, spec: ModelSpec, device: Device | None, world_size: int
) -> tuple[Case, Fit]:
    """Of the suitable candidates (``Fit.holds_rollout``, and consistent with written values), the
    one with the fastest training step.

    If none is suitable: with the smallest micro-batch, the one that fits with the widest interval,
    else the one that is closest to fitting. Candidates vary checkpointing and KV sleep, each with
    its largest suitable micro-batch. With
    tensor_parallel_size auto: the smallest number of cards with which the run fits.
    """
    numbers = _splits(config, spec, device, world_size)
    tried: list[tuple[Case, Fit]] = []
    for number in numbers:
        model = replace(config.model, tensor_parallel_size=number)
        tried.append(_best_way(replace(config, model=model), spec, device, world_size))
        if tried[-1][1].fits:
            return tried[-1]
    return min(tried, key=lambda pair: pair[1].short_bytes)


def _splits(
    config: RunConfig, spec: ModelSpec, device: Device | None, world_size: int
) -> list[int]:
    """The tensor_parallel_size that is written, or those to try: with each, groups of completions
    are dealt evenly.
    """
    written = config.model.tensor_parallel_size
    if written != "auto":
        return [written]
    run = resolve_run(config, situation_of(device, world_size), targets=spec.targets)
    if run.engine == "transformers" or not config.model.share_weights:
        return [1]
    numbers = parallel.sizes(facts_of(spec), world_size)
    return [one for one in numbers if _deals_evenly(config, world_size // one)] or [1]


def _deals_evenly(config: RunConfig, replicas: int) -> bool:
    """Whether ``replicas`` can share a generation in whole groups."""
    try:
        _, _, own = batch_of(config.grpo, 1, on_cpu=False, world_size=replicas)
        return own * replicas % count(config.grpo, "num_generations") == 0
    except ConfigError:
        return False


def _best_way(
    config: RunConfig, spec: ModelSpec, device: Device | None, world_size: int
) -> tuple[Case, Fit]:
    """``best_case`` of one tensor_parallel_size."""
    run = resolve_run(config, situation_of(device, world_size), targets=spec.targets)
    config = run.config
    whole = spec
    work = read_workload(run, device)
    plan = plan_engine(config, spec, work, device)
    spec = one_card(whole, plan.tensor_parallel)
    if work.uses_engine:
        plan = plan.with_copies(written_copies(config, spec, plan))
    _check_cache(config, spec, work, plan)

    packed = uses_packs(config, spec)
    tokens = budgets(config, work, on_cpu=device is None) if packed else None
    fused = fuses(config, device)

    def judge(chosen: EnginePlan, mode: Checkpointing, size: int) -> tuple[Case, Fit]:
        micro, most = size, size * work.sequence_tokens
        if tokens is not None:  # ``size`` is a number of tokens
            fitting = [one for one in work.micro_batches if one * work.sequence_tokens <= size]
            micro, most = fitting[0] if fitting else work.micro_batches[-1], size
        step = _step(work, chosen, mode, micro, world_size)
        if packed:
            most = min(most, max(whole_tokens(work), work.sequence_tokens))
            step = replace(step, pack_tokens=most, passes=passes(work, most))
        step = replace(step, fused=fused, on_gpu=device is not None)
        case = Case(
            config=config,
            spec=spec,
            whole=whole,
            device=device,
            work=work,
            plan=chosen,
            step=step,
        )
        return case, evaluate(case)

    ways = [partial(judge, *way) for way in product(_sleeps(config, plan, work), _modes(config))]
    sizes = work.micro_batches if tokens is None else tokens
    found = [_largest(way, sizes) for way in ways]
    if suiting := [_with_copies(*pair) for pair in found if pair is not None]:
        return min(suiting, key=lambda pair: training_seconds(pair[0]) + added_seconds(pair[0]))
    smallest = [way(sizes[-1]) for way in ways]
    if fitting := [pair for pair in smallest if pair[1].fits]:
        return max(fitting, key=lambda pair: pair[1].max_bytes - pair[1].min_bytes)
    return min(smallest, key=lambda pair: pair[1].short_bytes)


def fuses(config: RunConfig, device: Device | None) -> bool:
    """Whether fused kernels will be on the model. For a card that is not here liger-kernel is taken
    to be installed: it is part of the cuda extra.
    """
    if device is None or config.runtime.fused_kernels is False:
        return False
    return installed(LIGER) if device.here else True


def _with_copies(case: Case, fit: Fit) -> tuple[Case, Fit]:
    """``case`` with the copies of 4-bit weights that fit, where the run file leaves that open."""
    if case.config.model.dequantized_rollouts != "auto" or not case.work.uses_engine:
        return case, fit
    copies = best_copies(case, fit)
    if not copies:
        return case, fit
    tried = replace(case, plan=case.plan.with_copies(copies))
    new = evaluate(tried)
    return (tried, new) if _suits(tried, new) else (case, fit)


def _check_cache(config: RunConfig, spec: ModelSpec, work: Workload, plan: EnginePlan) -> None:
    """Refuse a written KV cache that is too small for one sequence: vLLM would not start."""
    written = config.model.kv_cache_bytes
    if not work.uses_engine or not isinstance(written, int):
        return
    # vLLM reserves one empty block (BlockPool's null block).
    lengths = (plan.max_model_len, 1)
    least = sum(kv_sequence_bytes(spec, plan, tokens) for tokens in lengths)
    if written < least:
        raise ConfigError(
            f"{written} is less than {least}, the cache of one sequence of model.max_seq_length"
            f" {plan.max_model_len} and an empty block",
            where="model.kv_cache_bytes",
            fix=f"set it to auto, or to {least} or more, or lower model.max_seq_length",
        )


def _largest(
    way: Callable[[int], tuple[Case, Fit]], micros: tuple[int, ...]
) -> tuple[Case, Fit] | None:
    """The first suitable one of ``micros``, which are in descending order."""
    pairs: dict[int, tuple[Case, Fit]] = {}

    def suits(micro: int) -> bool:
        pairs[micro] = way(micro)
        return _suits(*pairs[micro])

    if suits(micros[0]):
        return pairs[micros[0]]
    # Among the rest, a smaller one never needs more memory. The first needs no accumulation, so it
    # may need less than the next.
    place = bisect_left(micros, True, lo=1, key=suits)
    return pairs[micros[place]] if place < len(micros) else None


def _suits(case: Case, fit: Fit) -> bool:
    """Whether the run fits at the written utilization, with the whole rollout in its KV cache."""
    written = case.config.model.gpu_memory_utilization
    if written == "auto" or case.device is None or not case.work.uses_engine:
        return fit.holds_rollout
    return fit.holds_rollout and written * case.device.cuda_total_bytes <= fit.max_bytes


def _sleeps(config: RunConfig, plan: EnginePlan, work: Workload) -> list[EnginePlan]:
    if config.model.enable_sleep_mode == "auto" and plan.on_gpu and work.uses_engine:
        return [plan.with_sleep(False), plan.with_sleep(True)]
    return [plan]


def _modes(config: RunConfig) -> list[Checkpointing]:
    written = config.lora.use_gradient_checkpointing
    return [False, True] if written == "auto" else [written]


def _step(
    work: Workload, plan: EnginePlan, mode: Checkpointing, micro: int, world_size: int
) -> StepPlan:
    return StepPlan(
        micro_batch=micro,
        accumulation=work.accumulation * work.micro_batch // micro,
        checkpointing=mode,
        compute_bytes=compute_bytes(plan.dtype),
        own_weights=not work.uses_engine or not plan.share_weights,
        packed=is_packed(plan.quantization),
        world_size=world_size,
    )


def _largest_micro_batch(case: Case) -> int:
    """The largest micro-batch that fits and divides the generation batch evenly; 0 if not even 1
    fits.

    As for the choice, the KV cache must hold all sequences of a rollout.
    """

    def fits(micro: int) -> bool:
        accumulation = max(case.work.accumulation * case.work.micro_batch // micro, 1)
        step = replace(case.step, micro_batch=micro, accumulation=accumulation)
        if step.pack_tokens is not None:
            most = min(
                micro * case.work.sequence_tokens,
                max(whole_tokens(case.work), case.work.sequence_tokens),
            )
            step = replace(step, pack_tokens=most, passes=passes(case.work, most))
        return evaluate(replace(case, step=step)).holds_rollout

    micros = divisors(case.work.rollouts)
    place = bisect_left(micros, True, key=fits)
    return micros[place] if place < len(micros) else 0
