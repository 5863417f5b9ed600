"""Evaluate held-out prompts with greedy decoding, with or without the adapter. The result is the
mean of each reward function.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from toolkit.engine.hf_engine import TransformersEngine
from toolkit.engine.mesh import run_on_first
from toolkit.engine.rollout_request import Sampling
from toolkit.train.data.prompt_format import token_ids

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from toolkit.config.run_config import RunConfig
    from toolkit.train.data.prompt_format import TemplateArguments
    from toolkit.train.rewards import Rewards

BATCH_SIZE = 250


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Means over ``count`` held-out prompts with one greedy completion each.

    ``mean_tokens`` is the mean length of the completions. ``reward`` is the mean of the total
    reward, and ``rewards`` has the mean of each reward function. These two cover only completions
    that were scored, and are None if no completion was scored.
    """

    count: int
    reward: float | None
    rewards: dict[str, float | None]
    mean_tokens: float

    def to_json(self) -> dict[str, Any]:
        """Return the values that are written to evaluation.json."""
        return {
            "count": self.count,
            "reward": self.reward,
            "rewards": self.rewards,
            "completion_length": self.mean_tokens,
        }


def engine_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return the vLLM engine of ``model``. If the model has no engine, return an object with the
    same interface that generates with transformers.
    """
    engine = getattr(model, "toolkit_engine", None)
    if engine is not None:
        return engine
    declared = model.generation_config.eos_token_id
    end_ids = {*(declared if isinstance(declared, list) else [declared]), tokenizer.eos_token_id}
    return TransformersEngine(
        model,
        pad_id=tokenizer.pad_token_id,
        end_ids={token_id for token_id in end_ids if token_id is not None},
        tokenizer=tokenizer,
    )


def should_evaluate(config: RunConfig, requested: bool | None) -> bool:
    """Return True if held-out prompts are evaluated before the first step and after the last step.

    ``requested`` is True for ``--evaluate``, False for ``--no-evaluate``, and None if neither
    option is given. For None, the result is True if the run file names held-out data and does not
    set ``grpo.eval_strategy``. If this key is set, TRL decides when to evaluate.
    """
    if requested is not None:
        return requested
    data, environment = config.dataset, config.environment
    has_held_out = data.eval_path is not None or data.eval_split is not None
    has_held_out = has_held_out or (environment is not None and environment.eval_size is not None)
    return has_held_out and "eval_strategy" not in config.grpo


def describe_evaluation(config: RunConfig, requested: bool | None) -> str:
    """Return a text for the first lines of the output. It says when the held-out prompts are
    evaluated.
    """
    strategy = config.grpo.get("eval_strategy", "no")
    times = []
    if should_evaluate(config, requested):
        times.append(
            "before the first step and after the last step, with one greedy completion per prompt"
        )
    if strategy == "steps":
        times.append(f"every {config.grpo.get('eval_steps') or 1} steps")
    elif strategy == "epoch":
        times.append("at the end of each epoch")
    if not times:
        return "not evaluated (grpo.eval_strategy is no)" if requested is None else "not evaluated"
    hint = " (grpo.eval_strategy: steps evaluates during training)" if strategy == "no" else ""
    return "evaluated " + ", and ".join(times) + hint


def evaluate(  # noqa: PLR0913 - all arguments are needed
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Any,
    rewards: Rewards,
    *,
    max_tokens: int,
    adapter: bool,
    template: TemplateArguments = None,
) -> Evaluation:
    """Draw and score one greedy completion per row of ``dataset``. Return the mean rewards and the
    mean length of the completions.

    If ``adapter`` is False, the base model is evaluated. ``template`` has the values of
    ``grpo.chat_template_kwargs``.
    """
    engine = engine_of(model, tokenizer)
    if adapter:
        engine.publish(model)
    sampling = Sampling(temperature=0.0, max_tokens=max_tokens, logprobs=None)
    scores: list[list[float | None]] = [[] for _ in rewards.functions]
    tokens = 0
    for start in range(0, len(dataset), BATCH_SIZE):
        rows = dataset[start : min(start + BATCH_SIZE, len(dataset))]
        prompts = rows.pop("prompt")
        ids = token_ids(prompts, tokenizer, template)
        completion_ids = engine.generate(ids, sampling, seed=0, adapter=adapter).completion_ids
        texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        chat = isinstance(prompts[0], list)
        completions = [[{"role": "assistant", "content": t}] for t in texts] if chat else texts
        tokens += sum(map(len, completion_ids))
        for values, function in zip(scores, rewards.functions, strict=True):
            values += run_on_first(
                partial(
                    function.score,
                    prompts=prompts,
                    completions=completions,
                    completion_ids=completion_ids,
                    **rows,
                )
            )
    totals = [_total_reward(row, rewards.weights) for row in zip(*scores, strict=True)]
    return Evaluation(
        count=len(dataset),
        reward=_mean(totals),
        rewards={
            function.__name__: _mean(values)
            for function, values in zip(rewards.functions, scores, strict=True)
        },
        mean_tokens=tokens / max(1, len(dataset)),
    )


def _total_reward(row: Sequence[float | None], weights: Sequence[float]) -> float | None:
    """Return the total reward of one completion. As in TRL, this is the weighted sum over the
    reward functions that scored the completion.

    Returns None if no function scored it.
    """
    scored = [
        weight * value for weight, value in zip(weights, row, strict=True) if value is not None
    ]
    return sum(scored) if scored else None


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean over the completions that were scored. Returns None if no completion was
    scored.
    """
    scored = [value for value in values if value is not None]
    return sum(scored) / len(scored) if scored else None
