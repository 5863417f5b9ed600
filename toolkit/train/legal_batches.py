"""Find batch sizes for a GRPOConfig with whole groups of completions, and list them in an error.

A generation batch has ``per_device_train_batch_size`` x processes x ``steps_per_generation``
completions. This number must be a multiple of ``num_generations``, the number of completions of one
prompt (a group).
"""

from __future__ import annotations

from math import gcd
from typing import TYPE_CHECKING, Any

from toolkit.base.errors import ConfigError, ConfigValueError
from toolkit.base.formatting import plural

if TYPE_CHECKING:
    from collections.abc import Collection

WHERE = "GRPOConfig"


def refuse_partial_groups(config: Any, user_fields: Collection[str]) -> None:
    """Reject a ``config`` whose batches do not contain whole groups of completions. Call this
    function after TRL's ``__post_init__`` has rejected ``config``. ``user_fields`` contains the
    names of the fields that the user passed.

    Raises:
        ConfigValueError: a batch does not contain whole groups. The fix lists valid batch sizes.
    """
    group = config.num_generations
    if type(group) is not int or group < 2:
        return
    size, has_size = config.generation_batch_size, config.generation_batch_size is not None
    if has_size and size % group:
        raise ConfigValueError(
            _partial_groups_text(config, user_fields),
            where=WHERE,
            fix=_valid_choices_text(config, user_fields),
        )
    eval_completions = config.per_device_eval_batch_size * config.world_size
    eval_group = config.num_generations_eval or group
    if config.eval_strategy not in (None, "no") and eval_completions % eval_group:
        group_field = "num_generations_eval" if config.num_generations_eval else "num_generations"
        raise ConfigValueError(
            f"an evaluation batch has {eval_completions} completions (per_device_eval_batch_size "
            f"{config.per_device_eval_batch_size} x {_process_count_text(config)}). This number is "
            f"not a multiple of {group_field}={eval_group}",
            where=WHERE,
            fix="set per_device_eval_batch_size="
            f"{_round_up(config.per_device_eval_batch_size, config.world_size, eval_group)}",
        )


def refuse_too_few_prompts(
    prompts: int, completions: int, group: int, *, where: str | None, batch: str, split: str = ""
) -> None:
    """Check that there are enough prompts for one generation of ``completions`` completions, where
    each prompt gets ``group`` of them. At the end of an epoch, TRL drops the last prompts if they
    do not fill a generation. With too few prompts, TRL would drop all of them, and no step would
    run.

    For the message, ``where`` names the data, ``batch`` names the keys that set ``completions``,
    and ``split`` says how the completions are split.

    Raises:
        ConfigError: there are too few prompts. The message has their number and the number needed.
    """
    needed = max(1, completions // group)
    if prompts >= needed:
        return
    fix = f"use at least {needed} prompts"
    if prompts:
        fix += f", or a generation batch of at most {prompts * group} completions ({batch})"
    raise ConfigError(
        f"the number of prompts is {prompts}, but one generation needs {needed} prompts, so no "
        f"step would run. A generation has {completions} completions{split}, and each prompt gets "
        f"{group} of them",
        where=where,
        fix=fix,
    )


def check_prompt_count(config: Any, train_dataset: Any) -> None:
    """Call ``refuse_too_few_prompts`` for ``config`` (a GRPOConfig) and a dataset. A dataset
    without a length is accepted.
    """
    if hasattr(train_dataset, "__len__"):
        refuse_too_few_prompts(
            len(train_dataset),
            config.generation_batch_size,
            config.num_generations,
            where="train_dataset",
            batch="per_device_train_batch_size x gradient_accumulation_steps x processes",
        )


def _repeats_for_whole_groups(size: int, group: int) -> int:
    """Return the smallest integer n for which n x ``size`` is a multiple of ``group``."""
    return group // gcd(size, group)


def _round_up(value: int, factor: int, group: int) -> int:
    """Return the smallest integer n >= ``value`` for which n x ``factor`` is a multiple of
    ``group``.
    """
    step = _repeats_for_whole_groups(factor, group)
    return -(-value // step) * step


def _partial_groups_text(config: Any, user_fields: Collection[str]) -> str:
    size, group = config.generation_batch_size, config.num_generations
    if "generation_batch_size" in user_fields:
        return f"generation_batch_size={size} is not a multiple of num_generations={group}"
    steps_field = _steps_field(user_fields)
    return (
        f"a generation batch has {plural(size, 'completion')} (per_device_train_batch_size "
        f"{config.per_device_train_batch_size} x {_process_count_text(config)} x {steps_field} "
        f"{config.steps_per_generation}). This number is not a multiple of num_generations={group}"
    )


def _process_count_text(config: Any) -> str:
    return "1 process" if config.world_size == 1 else f"{config.world_size} processes"


def _steps_field(user_fields: Collection[str]) -> str:
    if "steps_per_generation" in user_fields:
        return "steps_per_generation"
    return "gradient_accumulation_steps"


def _valid_choices_text(config: Any, user_fields: Collection[str]) -> str:
    """Return a text that lists fields of the config, each with a new value. If one of the fields
    gets its new value, every batch contains whole groups (all completions of a prompt).
    """
    group, size = config.num_generations, config.generation_batch_size
    per_device, ranks = config.per_device_train_batch_size, config.world_size
    steps = config.steps_per_generation
    if "generation_batch_size" in user_fields:
        one_step = per_device * ranks
        valid_unit = one_step * _repeats_for_whole_groups(one_step, group)
        choices = [f"generation_batch_size={-(-size // valid_unit) * valid_unit}"]
    else:
        choices = [
            f"per_device_train_batch_size={_round_up(per_device, ranks * steps, group)}",
            f"{_steps_field(user_fields)}={_round_up(steps, per_device * ranks, group)}",
        ]
    divisors = [number for number in range(2, size + 1) if size % number == 0]
    if divisors:
        choices.append(f"num_generations={' or '.join(map(str, divisors[-6:]))}")
    return f"set one of these fields: {'; '.join(choices)}"
