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

    Raises ConfigError if only one of the two keys is auto. If both are auto, raises ConfigError
    without a generation_batch_size.
    """
    keys = (MICRO_BATCH, ACCUMULATION)
    autos = [key for key in keys if grpo.get(key) == "auto"]
    if not autos:
        return False
    if len(autos) == 1:
        other = next(key for key in keys if key not in autos)
        raise ConfigError(
            f"{autos[0]} is auto, but {other} is not",
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
    world = max(world_size, 1)
    if not is_auto(grpo):
        micro, accumulation = read_count(grpo, MICRO_BATCH), read_count(grpo, ACCUMULATION)
        generation = grpo.get(GENERATION_BATCH)
        if isinstance(generation, int) and generation > 0:
            return (micro,), accumulation, max(micro, generation // world)
        steps = grpo.get("steps_per_generation")
        steps = steps if isinstance(steps, int) and steps > 0 else accumulation
        return (micro,), accumulation, micro * steps
    whole = read_count(grpo, GENERATION_BATCH)
    if whole % world:
        raise ConfigError(
            f"{whole} completions per rollout cannot be divided evenly among {world} processes",
            where=f"grpo.{GENERATION_BATCH}",
            fix=f"set {GENERATION_BATCH} to {-(-whole // world) * world}",
        )
    own = whole // world
    micros = divisors(own)
    if on_cpu:
        micros = tuple(one for one in micros if one == 1 or one * sequence <= MAX_CPU_TOKENS)[:1]
    return micros, own // micros[0], own


def divisors(number: int) -> tuple[int, ...]:
    """The divisors of ``number`` (above 0), in descending order."""
    small = [one for one in range(1, int(number**0.5) + 1) if number % one == 0]
    return tuple(sorted({*small, *(number // one for one in small)}, reverse=True))


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
