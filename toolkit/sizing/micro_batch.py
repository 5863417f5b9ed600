"""Micro-batch x accumulation of one process: as written, or the candidates for "auto".

With ``auto`` a generation batch is one optimizer step, whichever way it is cut: a micro-batch is a
divisor of the completions of one process, and accumulation is what is left. The gradient is the
same for every cut (rule GRPO029 refuses the losses for which it is not).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.base.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

MICRO, ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"
GENERATION = "generation_batch_size"
# trl.GRPOConfig 1.16; held by tests/contract/test_sizing_upstream.py.
TRL_DEFAULTS: Mapping[str, Any] = {
    MICRO: 8,
    ACCUMULATION: 1,
    "per_device_eval_batch_size": 8,
    "num_generations": 8,
    "max_completion_length": 512,
    "beta": 0.0,
    "optim": "adamw_torch_fused",
}
# On a CPU the choice must not hang on what memory is free: up to this many tokens a micro-batch.
CPU_TOKENS = 1 << 15
MOST = 1 << 24


def is_auto(grpo: Mapping[str, Any]) -> bool:
    """Whether the cut is left to sizing. Raises ConfigError where only half of it is, or what is to
    be cut is not said.
    """
    keys = (MICRO, ACCUMULATION)
    autos = [key for key in keys if grpo.get(key) == "auto"]
    if not autos:
        return False
    if len(autos) == 1:
        other = next(key for key in keys if key not in autos)
        raise ConfigError(
            f"{autos[0]} is auto and {other} is not",
            where=f"grpo.{other}",
            fix=f"{other}: auto",
        )
    if grpo.get(GENERATION) is None:
        raise ConfigError(
            f"{MICRO} is auto, and nothing says how many completions a step has",
            where=f"grpo.{GENERATION}",
            fix=f"{GENERATION}: 64, a multiple of num_generations",
        )
    return True


def batch_of(
    grpo: Mapping[str, Any], sequence: int, *, on_cpu: bool, world_size: int
) -> tuple[tuple[int, ...], int, int]:
    """(candidates for the micro-batch, the largest first; accumulation of the first; completions of
    one generation) of one process. ``sequence``: tokens of a prompt with its completion.

    Raises ConfigError for numbers that no run can have.
    """
    world = max(world_size, 1)
    if not is_auto(grpo):
        micro, accumulation = count(grpo, MICRO), count(grpo, ACCUMULATION)
        generation = grpo.get(GENERATION)
        if isinstance(generation, int) and generation > 0:
            return (micro,), accumulation, max(micro, generation // world)
        steps = grpo.get("steps_per_generation")
        steps = steps if isinstance(steps, int) and steps > 0 else accumulation
        return (micro,), accumulation, micro * steps
    whole = count(grpo, GENERATION)
    if whole % world:
        raise ConfigError(
            f"{whole} completions cannot be shared evenly by {world} processes",
            where=f"grpo.{GENERATION}",
            fix=f"{GENERATION}: {-(-whole // world) * world}",
        )
    own = whole // world
    micros = divisors(own)
    if on_cpu:
        micros = tuple(one for one in micros if one == 1 or one * sequence <= CPU_TOKENS)[:1]
    return micros, own // micros[0], own


def divisors(number: int) -> tuple[int, ...]:
    """Of a number above 0, falling."""
    small = [one for one in range(1, int(number**0.5) + 1) if number % one == 0]
    return tuple(sorted({*small, *(number // one for one in small)}, reverse=True))


def count(grpo: Mapping[str, Any], key: str) -> int:
    """The number under ``key``, TRL's default where there is none. Raises ConfigError for what is
    no number from 1 on.
    """
    value = grpo.get(key)
    if value is None:
        value = TRL_DEFAULTS.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST:
        raise ConfigError(f"{value!r} is no integer from 1 to {MOST}", where=f"grpo.{key}")
    return value
