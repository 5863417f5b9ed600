"""Find batch sizes for a GRPOConfig with whole groups of completions, and list them in an error.

A generation batch has ``per_device_train_batch_size`` x processes x ``steps_per_generation``
completions. This number must be a multiple of ``num_generations``, the number of completions of one
prompt (a group).
"""

from __future__ import annotations

from math import gcd
from typing import TYPE_CHECKING, Any

from toolkit.base.errors import ConfigValueError
from toolkit.base.formatting import plural

if TYPE_CHECKING:
    from collections.abc import Collection

WHERE = "GRPOConfig"


def refuse_partial_groups(config: Any, written: Collection[str]) -> None:
    """Reject a ``config`` whose batches do not contain whole groups of completions. Call this
    function after TRL's ``__post_init__`` has rejected ``config``. ``written`` contains the names
    of the fields that the user passed.

    Raises:
        ConfigValueError: a batch does not contain whole groups. The fix lists valid batch sizes.
    """
    group = config.num_generations
    if type(group) is not int or group < 2:
        return
    size, whole = config.generation_batch_size, config.generation_batch_size is not None
    if whole and size % group:
        raise ConfigValueError(
            _partial_groups_text(config, written), where=WHERE, fix=_choices(config, written)
        )
    per_eval = config.per_device_eval_batch_size * config.world_size
    wanted = config.num_generations_eval or group
    if config.eval_strategy not in (None, "no") and per_eval % wanted:
        name = "num_generations_eval" if config.num_generations_eval else "num_generations"
        raise ConfigValueError(
            f"an evaluation batch has {per_eval} completions (per_device_eval_batch_size "
            f"{config.per_device_eval_batch_size} x {_processes(config)}). This number is not a "
            f"multiple of {name}={wanted}",
            where=WHERE,
            fix="set per_device_eval_batch_size="
            f"{_next(config.per_device_eval_batch_size, config.world_size, wanted)}",
        )


def _factor(size: int, group: int) -> int:
    """Return the smallest integer n for which n x ``size`` is a multiple of ``group``."""
    return group // gcd(size, group)


def _next(value: int, others: int, group: int) -> int:
    """Return the smallest integer n >= ``value`` for which n x ``others`` is a multiple of
    ``group``.
    """
    step = _factor(others, group)
    return -(-value // step) * step


def _partial_groups_text(config: Any, written: Collection[str]) -> str:
    size, group = config.generation_batch_size, config.num_generations
    if "generation_batch_size" in written:
        return f"generation_batch_size={size} is not a multiple of num_generations={group}"
    name = _steps_name(written)
    return (
        f"a generation batch has {plural(size, 'completion')} (per_device_train_batch_size "
        f"{config.per_device_train_batch_size} x {_processes(config)} x {name} "
        f"{config.steps_per_generation}). This number is not a multiple of num_generations={group}"
    )


def _processes(config: Any) -> str:
    return "1 process" if config.world_size == 1 else f"{config.world_size} processes"


def _steps_name(written: Collection[str]) -> str:
    if "steps_per_generation" in written:
        return "steps_per_generation"
    return "gradient_accumulation_steps"


def _choices(config: Any, written: Collection[str]) -> str:
    """Return a text that lists fields of the config, each with a new value. If one of the fields
    gets its new value, every batch contains whole groups (all completions of a prompt).
    """
    group, size = config.num_generations, config.generation_batch_size
    per_device, ranks = config.per_device_train_batch_size, config.world_size
    steps = config.steps_per_generation
    if "generation_batch_size" in written:
        one_step = per_device * ranks
        unit = one_step * _factor(one_step, group)
        choices = [f"generation_batch_size={-(-size // unit) * unit}"]
    else:
        choices = [
            f"per_device_train_batch_size={_next(per_device, ranks * steps, group)}",
            f"{_steps_name(written)}={_next(steps, per_device * ranks, group)}",
        ]
    fitting = [number for number in range(2, size + 1) if size % number == 0]
    if fitting:
        choices.append(f"num_generations={' or '.join(map(str, fitting[-6:]))}")
    return f"set one of these fields: {'; '.join(choices)}"
