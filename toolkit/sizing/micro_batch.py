"""Read the micro-batch and the gradient accumulation of one process from the run file. For "auto",
list the possible micro-batches.

With "auto", the completions of one rollout (a generation batch) make one optimizer step. The number
of completions of one process is micro-batch x accumulation. So the micro-batch must divide this
number. The choice of the micro-batch does not change the gradient: rule GRPO029 refuses "auto" for
the losses that depend on the micro-batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.base.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

MICRO_BATCH, ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"
GENERATION_BATCH = "generation_batch_size"
# trl.GRPOConfig 1.16; checked by tests/contract/test_sizing_upstream.py.
TRL_DEFAULTS: Mapping[str, Any] = {
    MICRO_BATCH: 8,
    ACCUMULATION: 1,
    "per_device_eval_batch_size": 8,
    "num_generations": 8,
    "max_completion_length": 512,
    "beta": 0.0,
    "optim": "adamw_torch_fused",
}
# On a CPU the choice must not depend on the free memory, so a micro-batch has at most this many
# tokens.
MAX_CPU_TOKENS = 1 << 15
MAX_COUNT = 1 << 24


def is_auto(grpo: Mapping[str, Any]) -> bool:
    """Whether the keys for the micro-batch and the accumulation are both auto, so that the sizer
    chooses them.

    Raises ConfigError if only one of the two keys is auto. Also raises ConfigError if both keys are
    auto, but generation_batch_size is not set.
    """
    keys = (MICRO_BATCH, ACCUMULATION)
    auto_keys = [key for key in keys if grpo.get(key) == "auto"]
    if not auto_keys:
        return False
    if len(auto_keys) == 1:
        other = next(key for key in keys if key not in auto_keys)
        raise ConfigError(
            f"{auto_keys[0]} is auto, but {other} is not",
            where=f"grpo.{other}",
            fix=f"set {other}: auto",
        )
    if grpo.get(GENERATION_BATCH) is None:
        raise ConfigError(
            f"{MICRO_BATCH} is auto, but no key gives the number of completions per step",
            where=f"grpo.{GENERATION_BATCH}",
            fix=f"set {GENERATION_BATCH} to a multiple of num_generations, such as 64",
        )
    return True


def read_batch(
    grpo: Mapping[str, Any], sequence: int, *, on_cpu: bool, world_size: int
) -> tuple[tuple[int, ...], int, int]:
    """Return (micro-batches, accumulation, completions) of one process.

    - micro-batches: the candidates for the micro-batch, the largest first.
    - accumulation: the gradient accumulation that belongs to the first candidate.
    - completions: the number of completions of one rollout.

    ``sequence`` is the number of tokens of a prompt with its completion. Raises ConfigError if the
    numbers in the run file do not fit together.
    """
    processes = max(world_size, 1)
    if not is_auto(grpo):
        micro_batch, accumulation = read_count(grpo, MICRO_BATCH), read_count(grpo, ACCUMULATION)
        generation = grpo.get(GENERATION_BATCH)
        if isinstance(generation, int) and generation > 0:
            return (micro_batch,), accumulation, max(micro_batch, generation // processes)
        steps = grpo.get("steps_per_generation")
        steps = steps if isinstance(steps, int) and steps > 0 else accumulation
        return (micro_batch,), accumulation, micro_batch * steps
    generation_batch = read_count(grpo, GENERATION_BATCH)
    if generation_batch % processes:
        raise ConfigError(
            f"{generation_batch} completions per rollout cannot be divided evenly among "
            f"{processes} processes",
            where=f"grpo.{GENERATION_BATCH}",
            fix=f"set {GENERATION_BATCH} to {-(-generation_batch // processes) * processes}",
        )
    own_completions = generation_batch // processes
    micro_batches = divisors(own_completions)
    if on_cpu:
        micro_batches = tuple(
            size for size in micro_batches if size == 1 or size * sequence <= MAX_CPU_TOKENS
        )[:1]
    return micro_batches, own_completions // micro_batches[0], own_completions


def divisors(number: int) -> tuple[int, ...]:
    """The divisors of ``number`` (above 0), in descending order."""
    small_divisors = [
        divisor for divisor in range(1, int(number**0.5) + 1) if number % divisor == 0
    ]
    return tuple(
        sorted({*small_divisors, *(number // divisor for divisor in small_divisors)}, reverse=True)
    )


def read_count(grpo: Mapping[str, Any], key: str) -> int:
    """The number under ``key`` in the ``grpo`` section of the run file, or TRL's default. Raises
    ConfigError if it is not an integer from 1 to ``MAX_COUNT``.
    """
    value = grpo.get(key)
    if value is None:
        value = TRL_DEFAULTS.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_COUNT:
        raise ConfigError(
            f"{value!r} must be an integer from 1 to {MAX_COUNT}", where=f"grpo.{key}"
        )
    return value
