"""Greedy evaluation on held-out prompts: every reward's mean, with and without the adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toolkit.engine.rollout import Sampling
from toolkit.engine.transformers_engine import TransformersEngine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from toolkit.train.rewards import Rewards

BATCH = 250


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Means over ``count`` held-out prompts, one completion each, greedy."""

    count: int
    reward: float
    rewards: dict[str, float]
    length: float

    def to_json(self) -> dict[str, Any]:
        """As in evaluation.json."""
        return {
            "count": self.count,
            "reward": self.reward,
            "rewards": self.rewards,
            "completion_length": self.length,
        }


def engine_of(model: Any, tokenizer: Any) -> Any:
    """The engine on the model, or Hugging Face generation with the same face."""
    engine = getattr(model, "toolkit_engine", None)
    if engine is not None:
        return engine
    declared = model.generation_config.eos_token_id
    ends = {*(declared if isinstance(declared, list) else [declared]), tokenizer.eos_token_id}
    return TransformersEngine(
        model,
        pad_id=tokenizer.pad_token_id,
        end_ids={end for end in ends if end is not None},
        tokenizer=tokenizer,
    )


def token_ids(prompts: Sequence[Any], tokenizer: Any) -> list[list[int]]:
    """Prompts (text, or chat messages) as the trainer tokenizes them."""
    if prompts and isinstance(prompts[0], list):
        rendered = tokenizer.apply_chat_template(
            list(prompts), add_generation_prompt=True, tokenize=True, return_dict=True
        )
        return list(rendered["input_ids"])
    return list(tokenizer(text=list(prompts))["input_ids"])


def evaluate(
    model: Any, tokenizer: Any, dataset: Any, rewards: Rewards, *, max_tokens: int, adapter: bool
) -> Evaluation:
    """One greedy completion a row of ``dataset``; ``adapter`` False judges the base model."""
    engine = engine_of(model, tokenizer)
    if adapter:
        engine.publish(model)
    sampling = Sampling(temperature=0.0, max_tokens=max_tokens, logprobs=None)
    totals = dict.fromkeys((function.__name__ for function in rewards.functions), 0.0)
    total = tokens = 0.0
    for start in range(0, len(dataset), BATCH):
        rows = dataset[start : min(start + BATCH, len(dataset))]
        prompts = rows.pop("prompt")
        ids = token_ids(prompts, tokenizer)
        completion_ids = engine.generate(ids, sampling, seed=0, adapter=adapter).completion_ids
        texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        chat = isinstance(prompts[0], list)
        completions = [[{"role": "assistant", "content": t}] for t in texts] if chat else texts
        tokens += sum(map(len, completion_ids))
        for function, weight in zip(rewards.functions, rewards.weights, strict=True):
            values = function.score(
                prompts=prompts, completions=completions, completion_ids=completion_ids, **rows
            )
            scored = sum(value for value in values if value is not None)
            totals[function.__name__] += scored
            total += weight * scored
    count = max(1, len(dataset))
    return Evaluation(
        count=len(dataset),
        reward=total / count,
        rewards={name: value / count for name, value in totals.items()},
        length=tokens / count,
    )
