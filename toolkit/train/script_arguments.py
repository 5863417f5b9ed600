"""Check the arguments that a Python script passes to the trainer, before the first step. The same
checks apply to a run file.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from toolkit.base.errors import ConfigError, ToolkitWarning
from toolkit.config.trl_names import needed_packages
from toolkit.train.error_collector import ErrorCollector
from toolkit.train.rewards.script_rewards import wrap_reward_funcs
from toolkit.train.rollout import prompt_choice
from toolkit.train.trl_arguments import refuse_missing_packages

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from transformers import PreTrainedModel

    from toolkit.train.trainer_seam import TrainerSeam


def check_arguments(arguments: MutableMapping[str, Any], model: PreTrainedModel) -> None:
    """Check ``arguments``, the arguments of a trainer of ``model``. In ``arguments``, each reward
    function is replaced by a function that calls the reward function and checks the returned
    rewards.

    Raises:
        ConfigError: a reward cannot be called, ``max_completion_length`` leaves no room for a
            prompt, or an argument cannot be used with dynamic sampling or the curriculum.
        MissingExtraError: the package of a tracker or an optimizer is not installed.

    If there are several mistakes, the message lists all of them. The first mistake
    determines the class of the error.
    """
    config, collector = arguments["args"], ErrorCollector()
    with collector.collect_error():
        prompt_choice.check_arguments(arguments)
    with collector.collect_error():
        arguments["reward_funcs"] = wrap_reward_funcs(arguments.get("reward_funcs"))
    if arguments.get("optimizers", (None, None))[0] is None:
        with collector.collect_error():
            refuse_missing_packages(
                needed_packages(
                    config.report_to or (),
                    str(getattr(config.optim, "value", config.optim)),
                    use_liger=bool(config.use_liger_kernel),
                    cache=config.cache_implementation,
                )
            )
    with collector.collect_error():
        _refuse_too_long_completions(config, getattr(model, "max_seq_length", None))
    collector.raise_errors()


def _refuse_too_long_completions(config: Any, max_seq_length: int | None) -> None:
    """Reject a ``max_completion_length`` that leaves no room for a prompt. ``max_seq_length`` is
    the model's limit, the highest number of tokens of prompt and completion together.
    """
    max_completion_length = config.max_completion_length
    if (
        max_seq_length is None
        or max_completion_length is None
        or max_completion_length < max_seq_length
    ):
        return
    raise ConfigError(
        f"max_completion_length={max_completion_length} leaves no room for a prompt. "
        f"The model was loaded with max_seq_length={max_seq_length}, which "
        "limits prompt and completion together",
        where="GRPOConfig",
        fix=f"set max_completion_length to less than {max_seq_length} tokens, or load the "
        f"model with a max_seq_length above {max_completion_length} tokens",
    )


def truncate_prompts(
    trainer: TrainerSeam, prompt_ids: list[list[int]], images: Any
) -> list[list[int]]:
    """Keep the last ``max_prompt_length`` tokens of each prompt, as TRL did before 0.24."""
    max_prompt_length = getattr(getattr(trainer, "args", None), "max_prompt_length", None)
    if max_prompt_length is None or images is not None:
        return prompt_ids
    longest = max(map(len, prompt_ids), default=0)
    if longest > max_prompt_length and not trainer.truncation_reported:
        trainer.truncation_reported = True
        warnings.warn(
            f"a prompt has {longest} tokens, which is more than "
            f"max_prompt_length={max_prompt_length}. The start of such a "
            "prompt (often the system prompt) is removed",
            ToolkitWarning,
            stacklevel=2,
        )
    return [ids[-max_prompt_length:] for ids in prompt_ids]
