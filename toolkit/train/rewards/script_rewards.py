"""Check reward functions that a script passes to the trainer. The messages are the same as for the
rewards of a run file.

Without this check, TRL would fail with an error of torch when it converts the returned values to a
tensor.
"""

from __future__ import annotations

import inspect
import math
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

from toolkit.base.errors import ConfigTypeError, ConfigValueError
from toolkit.config.reward_table import ALWAYS_PASSED
from toolkit.train.rewards.error_policy import GuardedReward
from toolkit.train.rewards.reward_call import is_async
from toolkit.train.rewards.score_checks import Failure, UserCodeFailed, check_scores
from toolkit.train.rewards.user_reward import check_signature

if TYPE_CHECKING:
    from collections.abc import Callable

RETURN_LIST_FIX = "return a list with one number (or None) for each completion"


def wrap_reward_funcs(reward_funcs: Any) -> Any:
    """Check ``reward_funcs``, the argument of a trainer. Return ``reward_funcs`` with a wrapper in
    place of each reward function.

    The parameters of a reward function are checked now. At each call, the wrapper calls the reward
    function and checks the values that it returns. TRL itself checks the number of these values.
    An exception of a reward function is raised unchanged. Reward models and names of models are
    returned unchanged.

    Raises:
        ConfigTypeError: a function does not accept every keyword argument, or a reward is not a
            function.
    """
    if isinstance(reward_funcs, (list, tuple)):
        return [_wrap_reward(reward) for reward in reward_funcs]
    return None if reward_funcs is None else _wrap_reward(reward_funcs)


def _wrap_reward(reward: object) -> Any:
    if isinstance(reward, (str, GuardedReward)) or hasattr(reward, "parameters"):
        return reward  # the name of a reward model, a reward of a run file, or a torch module
    name = _metric_name(reward)
    if not callable(reward):
        raise ConfigTypeError(
            f"the reward {reward!r} must be a function, not {type(reward).__name__}",
            where="reward_funcs",
            fix="pass the function itself: reward_funcs=[correctness]",
        )
    if not _accepts_trl_arguments(reward):
        check_signature(name, reward)
    wrapper = _wrap_async(reward, name) if is_async(reward) else _wrap_sync(reward, name)
    wrapper.__name__ = name
    return wrapper


def _wrap_sync(reward: Callable[..., Any], name: str) -> Callable[..., Any]:
    @wraps(reward)
    def call(*args: Any, **kwargs: Any) -> Any:
        return _check_result(reward(*args, **kwargs), name)

    return call


def _wrap_async(reward: Callable[..., Any], name: str) -> Callable[..., Any]:
    @wraps(reward)
    async def call(*args: Any, **kwargs: Any) -> Any:
        return _check_result(await reward(*args, **kwargs), name)

    return call


def _check_result(returned: object, name: str) -> list[float | None]:
    """Return the values that a reward returned, as floats or None. NaN becomes None, because TRL
    treats NaN in the same way as None.

    Raises:
        ConfigValueError: the result is not a list of numbers.
    """
    try:
        scores = check_scores(returned, _length_or_zero(returned))
    except UserCodeFailed as error:
        raise ConfigValueError(
            f"reward {name} {error.failure.description}", fix=RETURN_LIST_FIX
        ) from None
    valid_scores: list[float | None] = []
    for index, value in enumerate(scores):
        if isinstance(value, Failure):
            if value.returned is not None and _is_nan(value.returned):
                valid_scores.append(None)
                continue
            raise ConfigValueError(
                f"reward {name} {value.description} (sample {index} of {len(scores)})",
                fix=RETURN_LIST_FIX,
            )
        valid_scores.append(value)
    return valid_scores


def _length_or_zero(returned: Any) -> int:
    try:
        return len(returned)
    except TypeError:
        return 0


def _is_nan(text: str) -> bool:
    try:
        return math.isnan(float(text))
    except ValueError:
        return text == "tensor(nan)"


def _metric_name(reward: object) -> str:
    """The name of the function in metrics, as in ``trl.trainer.utils.get_callable_name`` (TRL
    1.16).
    """
    while isinstance(reward, partial):
        reward = reward.func
    return str(getattr(reward, "__name__", type(reward).__name__))


def _accepts_trl_arguments(reward: Callable[..., Any]) -> bool:
    """Whether ``reward`` has a named parameter for every argument that TRL always passes. If it has
    them all, ``reward`` needs ``**kwargs`` only for further columns of the dataset.

    If Python cannot determine the parameters, the result is True.
    """
    try:
        names = set(inspect.signature(reward).parameters)
    except (TypeError, ValueError):
        return True
    return names >= set(ALWAYS_PASSED)
