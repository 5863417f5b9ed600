"""Check the arguments that a Python script passes to the trainer, before the first step. The same
checks apply to a run file.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from toolkit.base.errors import ConfigError, ToolkitWarning
from toolkit.config.trl_names import needed_packages
from toolkit.train.collected import ErrorCollector
from toolkit.train.rewards.script import wrap_reward_funcs
from toolkit.train.rollout import prompt_choice
from toolkit.train.trl_arguments import refuse_missing_packages

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from toolkit.train.trainer_seam import TrainerSeam


def check_arguments(given: MutableMapping[str, Any], model: Any) -> None:
    """Check ``given``, the arguments of a trainer of ``model``. In ``given``, each reward function
    is replaced by a function that calls the reward function and checks the returned rewards.

    Raises:
        ConfigError: a reward cannot be called, ``max_completion_length`` leaves no room for a
            prompt, or an argument cannot be used with dynamic sampling or the curriculum.
        MissingExtraError: the package of a tracker or an optimizer is not installed.

    If there are several mistakes, the message lists all of them. The first mistake
    determines the class of the error.
    """
    config, collector = given["args"], ErrorCollector()
    with collector.check():
        prompt_choice.check_arguments(given)
    with collector.check():
        given["reward_funcs"] = wrap_reward_funcs(given.get("reward_funcs"))
    if given.get("optimizers", (None, None))[0] is None:
        with collector.check():
            refuse_missing_packages(
                needed_packages(
                    config.report_to or (),
                    str(getattr(config.optim, "value", config.optim)),
                    use_liger=bool(config.use_liger_kernel),
                    cache=config.cache_implementation,
                )
            )
    with collector.check():
        _refuse_no_room(config, getattr(model, "max_seq_length", None))
    collector.raise_errors()


def _refuse_no_room(config: Any, longest: int | None) -> None:
    """Reject a ``max_completion_length`` that leaves no room for a prompt. ``longest`` is the
    model's ``max_seq_length``, the highest number of tokens of prompt and completion together.
    """
    wanted = config.max_completion_length
    if longest is None or wanted is None or wanted < longest:
        return
    raise ConfigError(
        f"max_completion_length={wanted} leaves no room for a prompt. The model was loaded with"
        f" max_seq_length={longest}, which limits prompt and completion together",
        where="GRPOConfig",
        fix=f"set max_completion_length to less than {longest} tokens, or load the model with a"
        f" max_seq_length above {wanted} tokens",
    )


def truncate_prompts(
    trainer: TrainerSeam, prompt_ids: list[list[int]], images: Any
) -> list[list[int]]:
    """Keep the last ``max_prompt_length`` tokens of each prompt, as TRL did before 0.24."""
    most = getattr(getattr(trainer, "args", None), "max_prompt_length", None)
    if most is None or images is not None:
        return prompt_ids
    longest = max(map(len, prompt_ids), default=0)
    if longest > most and not trainer.truncation_reported:
        trainer.truncation_reported = True
        warnings.warn(
            f"a prompt has {longest} tokens, which is more than max_prompt_length={most}. The "
            "start of such a prompt (often the system prompt) is removed",
            ToolkitWarning,
            stacklevel=2,
        )
    return [ids[-most:] for ids in prompt_ids]
