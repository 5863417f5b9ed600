"""Compute for a run file, a model and a card: the interval of gpu_memory_utilization, a value for
every "auto", and the budget of all memory terms.
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
from toolkit.config.trl_names import LIGER_PACKAGE, is_installed
from toolkit.sizing.build_result import build_result
from toolkit.sizing.dequantized import best_copy_bytes, requested_copy_bytes
from toolkit.sizing.device import device_situation, device_with_least_free_memory
from toolkit.sizing.engine_bytes import kv_sequence_bytes
from toolkit.sizing.engine_plan import plan_engine
from toolkit.sizing.fit import Candidate, evaluate
from toolkit.sizing.longest_sequence import longest_fitting_sequence
from toolkit.sizing.micro_batch import divisors, read_batch, read_count
from toolkit.sizing.packs import all_rows_tokens, passes_per_step, token_budgets, uses_packs
from toolkit.sizing.remedies import find_remedies
from toolkit.sizing.spec import read_spec
from toolkit.sizing.step_time import dequantize_seconds, training_seconds
from toolkit.sizing.tensor_parallel import spec_of_one_card, split_facts
from toolkit.sizing.trainer_bytes import compute_bytes, is_bitsandbytes
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
    """Compute the memory of the run on ``device`` (None: the CPU).

    If the run does not fit, the result has ``feasible`` False and a list of remedies. Raises
    ConfigError for values that no run can have. An example is a LoRA rank that is larger than the
    largest rank that the engine supports.
    """
    candidate, fit = best_candidate(config, spec, device, world_size)
    if fit.fits:
        return build_result(candidate, fit, largest_micro_batch=_largest_micro_batch(candidate))

    def attempt(
        config: RunConfig, world_size: int = world_size, device: Device | None = device
    ) -> tuple[Candidate, Fit]:
        return best_candidate(config, spec, device, world_size)

    remedies = find_remedies(config, candidate, fit.short_bytes, attempt)
    longest_sequence = longest_fitting_sequence(
        config, candidate, lambda changed_config: attempt(changed_config)[1]
    )
    largest_micro_batch = _largest_micro_batch(candidate)
    return build_result(
        candidate,
        fit,
        largest_micro_batch=largest_micro_batch,
        remedies=remedies,
        longest_sequence=longest_sequence,
    )


def resolve(
    config: RunConfig, device: Device | None, *, world_size: int = 1
) -> tuple[RunConfig, SizingResult]:
    """Read the model and compute the memory of the run. Return the run file with every "auto"
    replaced, and the result of sizing. Raises ConfigError with the list of remedies if the run does
    not fit.
    """
    spec = read_spec(config.model.model_name, config.model.revision)
    result = solve(config, spec, device, world_size=world_size)
    return result.apply(config), result


def resolve_for_all(
    config: RunConfig, devices: Sequence[Device | None], *, world_size: int
) -> tuple[RunConfig, SizingResult, Device | None]:
    """Size a run with several processes, each on one of ``devices``. Return three values: the run
    file with every "auto" replaced, the result of sizing, and the device with the least free
    memory. The sizes are those for this device, and all processes use the same values.

    Raises:
        ConfigError: the run does not fit on one of the devices, or only some processes have a GPU.
    """
    device = device_with_least_free_memory(devices)
    resolved, sizing = resolve(config, device, world_size=world_size)
    for other in devices:
        # Another GPU may have more memory in total but less of it free. Then the share that was
        # chosen for the first device may be too large there.
        if device is not None and other is not None and other.total_bytes != device.total_bytes:
            resolve(resolved, other, world_size=world_size)
    return resolved, sizing, device


def best_candidate(
    config: RunConfig, spec: ModelSpec, device: Device | None, world_size: int
) -> tuple[Candidate, Fit]:
    """Return the best candidate for the run, with its fit. Candidates differ in gradient
    checkpointing, KV sleep (freeing the KV cache while training) and micro-batch.

    A candidate is suitable if it meets two conditions. It fits with a KV cache for all sequences of
    a rollout (``Fit.holds_rollout``). It fits at the gpu_memory_utilization of the run file, if the
    run file sets a number. The best candidate is the suitable one with the fastest training step.

    If no candidate is suitable, only candidates with the smallest micro-batch are compared. If some
    of them fit with a smaller KV cache or another gpu_memory_utilization, the best one is the one
    that fits with the widest interval of values of gpu_memory_utilization. If none fits, the best
    one is the one with the least missing memory.

    With tensor_parallel_size "auto", the model is split over the smallest number of cards with
    which the run fits.
    """
    split_sizes = _possible_splits(config, spec, device, world_size)
    results: list[tuple[Candidate, Fit]] = []
    for split_size in split_sizes:
        model = replace(config.model, tensor_parallel_size=split_size)
        results.append(_best_for_split(replace(config, model=model), spec, device, world_size))
        if results[-1][1].fits:
            return results[-1]
    return min(results, key=lambda pair: pair[1].short_bytes)


def _possible_splits(
    config: RunConfig, spec: ModelSpec, device: Device | None, world_size: int
) -> list[int]:
    """Return the possible values of tensor_parallel_size. If the run file sets a number, this
    number is the only value. For "auto", a value is possible if the completions of a rollout divide
    evenly over the replicas of the model.
    """
    configured = config.model.tensor_parallel_size
    if configured != "auto":
        return [configured]
    run = resolve_run(config, device_situation(device, world_size), targets=spec.targets)
    if run.engine == "transformers" or not config.model.share_weights:
        return [1]
    sizes = parallel.possible_sizes(split_facts(spec), world_size)
    return [size for size in sizes if _divides_evenly(config, world_size // size)] or [1]


def _divides_evenly(config: RunConfig, replicas: int) -> bool:
    """Whether the completions of a rollout divide evenly over ``replicas`` copies of the model, and
    consist of complete groups (a group is all completions of one prompt).
    """
    try:
        _, _, own_completions = read_batch(config.grpo, 1, on_cpu=False, world_size=replicas)
        return own_completions * replicas % read_count(config.grpo, "num_generations") == 0
    except ConfigError:
        return False


def _best_for_split(
    config: RunConfig, spec: ModelSpec, device: Device | None, world_size: int
) -> tuple[Candidate, Fit]:
    """Return the best candidate for one tensor_parallel_size, with its fit, by the criteria of
    ``best_candidate``.
    """
    run = resolve_run(config, device_situation(device, world_size), targets=spec.targets)
    config = run.config
    unsplit = spec
    work = read_workload(run, device)
    plan = plan_engine(config, spec, work, device)
    spec = spec_of_one_card(unsplit, plan.tensor_parallel)
    if work.uses_engine:
        plan = plan.with_copies(requested_copy_bytes(config, spec, plan))
    _check_kv_cache_size(config, spec, work, plan)

    packed = uses_packs(config, spec)
    budgets = token_budgets(config, work, on_cpu=device is None) if packed else None
    uses_fused = will_use_fused_kernels(config, device)

    def evaluate_variant(
        variant_plan: EnginePlan, checkpointing: Checkpointing, size: int
    ) -> tuple[Candidate, Fit]:
        micro_batch, pack_tokens = size, size * work.sequence_tokens
        if budgets is not None:  # ``size`` is a number of tokens
            fitting = [one for one in work.micro_batches if one * work.sequence_tokens <= size]
            micro_batch, pack_tokens = fitting[0] if fitting else work.micro_batches[-1], size
        step = _plan_step(work, variant_plan, checkpointing, micro_batch, world_size)
        if packed:
            pack_tokens = min(pack_tokens, max(all_rows_tokens(work), work.sequence_tokens))
            step = replace(step, pack_tokens=pack_tokens, passes=passes_per_step(work, pack_tokens))
        step = replace(step, uses_fused_kernels=uses_fused, on_gpu=device is not None)
        candidate = Candidate(
            config=config,
            spec=spec,
            unsplit_spec=unsplit,
            device=device,
            work=work,
            plan=variant_plan,
            step=step,
        )
        return candidate, evaluate(candidate)

    variants = [
        partial(evaluate_variant, *variant)
        for variant in product(_sleep_variants(config, plan, work), _checkpointing_modes(config))
    ]
    sizes = work.micro_batches if budgets is None else budgets
    largest = [_largest_suitable(variant, sizes) for variant in variants]
    if suitable := [_with_copies(*pair) for pair in largest if pair is not None]:
        return min(
            suitable, key=lambda pair: training_seconds(pair[0]) + dequantize_seconds(pair[0])
        )
    smallest = [variant(sizes[-1]) for variant in variants]
    if fitting := [pair for pair in smallest if pair[1].fits]:
        return max(fitting, key=lambda pair: pair[1].max_bytes - pair[1].min_bytes)
    return min(smallest, key=lambda pair: pair[1].short_bytes)


def will_use_fused_kernels(config: RunConfig, device: Device | None) -> bool:
    """Whether the model will use fused kernels, which need liger-kernel. For a card of another
    node, liger-kernel is assumed to be installed, because it is part of the pip extra ``cuda``.
    """
    if device is None or config.runtime.fused_kernels is False:
        return False
    return is_installed(LIGER_PACKAGE) if device.is_local else True


def _with_copies(candidate: Candidate, fit: Fit) -> tuple[Candidate, Fit]:
    """Return ``candidate`` with as many 16-bit copies of 4-bit weights as fit. If the run file sets
    model.dequantized_rollouts to anything but "auto", return ``candidate`` unchanged.
    """
    if candidate.config.model.dequantized_rollouts != "auto" or not candidate.work.uses_engine:
        return candidate, fit
    copies = best_copy_bytes(candidate, fit)
    if not copies:
        return candidate, fit
    with_copies = replace(candidate, plan=candidate.plan.with_copies(copies))
    new_fit = evaluate(with_copies)
    return (with_copies, new_fit) if _is_suitable(with_copies, new_fit) else (candidate, fit)


def _check_kv_cache_size(
    config: RunConfig, spec: ModelSpec, work: Workload, plan: EnginePlan
) -> None:
    """Raise ConfigError if model.kv_cache_bytes in the run file is too small for one sequence,
    because vLLM would not start.
    """
    configured = config.model.kv_cache_bytes
    if not work.uses_engine or not isinstance(configured, int):
        return
    # vLLM reserves one empty block (the null block of BlockPool).
    lengths = (plan.max_model_len, 1)
    min_bytes = sum(kv_sequence_bytes(spec, plan, tokens) for tokens in lengths)
    if configured < min_bytes:
        raise ConfigError(
            f"a KV cache of {configured} bytes is too small: {min_bytes} bytes are needed for one "
            f"sequence of {plan.max_model_len} tokens (model.max_seq_length) and an empty block",
            where="model.kv_cache_bytes",
            fix=f"set model.kv_cache_bytes to auto or to at least {min_bytes}, or set a smaller "
            "model.max_seq_length",
        )


def _largest_suitable(
    evaluate_size: Callable[[int], tuple[Candidate, Fit]], sizes: tuple[int, ...]
) -> tuple[Candidate, Fit] | None:
    """Return the suitable candidate (``_is_suitable``) with the largest micro-batch, and its fit.
    Return None if no candidate is suitable. ``sizes`` are the possible micro-batches (for packs:
    numbers of tokens per pass), in descending order. ``evaluate_size`` returns the candidate and
    the fit for one of them.
    """
    pairs: dict[int, tuple[Candidate, Fit]] = {}

    def is_suitable(size: int) -> bool:
        pairs[size] = evaluate_size(size)
        return _is_suitable(*pairs[size])

    if is_suitable(sizes[0]):
        return pairs[sizes[0]]
    # After the first number, a smaller micro-batch never needs more memory. The first number needs
    # no accumulation, so it may need less memory than the next one.
    index = bisect_left(sizes, True, lo=1, key=is_suitable)
    return pairs[sizes[index]] if index < len(sizes) else None


def _is_suitable(candidate: Candidate, fit: Fit) -> bool:
    """Whether the run fits at the utilization that the run file sets, with a KV cache for all
    sequences of a rollout.
    """
    configured = candidate.config.model.gpu_memory_utilization
    if configured == "auto" or candidate.device is None or not candidate.work.uses_engine:
        return fit.holds_rollout
    return fit.holds_rollout and configured * candidate.device.cuda_total_bytes <= fit.max_bytes


def _sleep_variants(config: RunConfig, plan: EnginePlan, work: Workload) -> list[EnginePlan]:
    if config.model.enable_sleep_mode == "auto" and plan.on_gpu and work.uses_engine:
        return [plan.with_sleep(False), plan.with_sleep(True)]
    return [plan]


def _checkpointing_modes(config: RunConfig) -> list[Checkpointing]:
    configured = config.lora.use_gradient_checkpointing
    return [False, True] if configured == "auto" else [configured]


def _plan_step(
    work: Workload,
    plan: EnginePlan,
    checkpointing: Checkpointing,
    micro_batch: int,
    world_size: int,
) -> StepPlan:
    return StepPlan(
        micro_batch=micro_batch,
        accumulation=work.accumulation * work.micro_batch // micro_batch,
        checkpointing=checkpointing,
        compute_bytes=compute_bytes(plan.dtype),
        has_own_weights=not work.uses_engine or not plan.share_weights,
        is_quantized=is_bitsandbytes(plan.quantization),
        world_size=world_size,
    )


def _largest_micro_batch(candidate: Candidate) -> int:
    """The largest micro-batch that fits and that divides the number of completions of a process; 0
    if not even a micro-batch of 1 fits.

    As in ``best_candidate``, the KV cache must hold all sequences of a rollout.
    """

    def fits(micro_batch: int) -> bool:
        accumulation = max(
            candidate.work.accumulation * candidate.work.micro_batch // micro_batch, 1
        )
        step = replace(candidate.step, micro_batch=micro_batch, accumulation=accumulation)
        if step.pack_tokens is not None:
            pack_tokens = min(
                micro_batch * candidate.work.sequence_tokens,
                max(all_rows_tokens(candidate.work), candidate.work.sequence_tokens),
            )
            step = replace(
                step, pack_tokens=pack_tokens, passes=passes_per_step(candidate.work, pack_tokens)
            )
        return evaluate(replace(candidate, step=step)).holds_rollout

    micro_batches = divisors(candidate.work.rollouts)
    index = bisect_left(micro_batches, True, key=fits)
    return micro_batches[index] if index < len(micro_batches) else 0
