"""The built-in rewards and their options, and the arguments that every reward receives. A test
compares them with ``toolkit.train.rewards``.
"""

from __future__ import annotations

# reward -> option -> whether the option is required
BUILTIN_OPTIONS: dict[str, dict[str, bool]] = {
    "exact_match": {"column": False, "tag": False, "ignore_case": False},
    "numeric_match": {"column": False, "tag": False, "tolerance": False},
    "regex_match": {"pattern": True, "full": False, "ignore_case": False},
    "format": {"tags": False, "strict": False, "opened": False, "partial": False},
    "length_penalty": {"max_length": True, "margin": False, "unit": False},
    "reasoning_gym": {"task": True, "settings": False},
    "verifiers": {"task": True, "settings": False},
    "openenv": {"task": True, "settings": False},
    "math_verify": {"column": False, "tag": False, "seconds_each": False},
}

# The arguments that TRL 1.16 passes to every reward besides the columns of the data set. Columns
# cannot have these names (GRPOTrainer._calculate_rewards).
PASSED_ALWAYS = (
    "prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric",
)  # fmt: skip
# Columns that never reach a reward, and why.
LEFT_OUT = {
    **dict.fromkeys(PASSED_ALWAYS, "rewards receive something else as {name}"),
    **dict.fromkeys(("image", "images"), "the trainer reads it as images, but it trains on text"),
    "completion": "the trainer uses this name for its own completions",
}
# All arguments that TRL may pass to a reward; environments only if the run has environments.
PASSED_BY_TRL = frozenset((*PASSED_ALWAYS, "environments"))


def metric_names(names: list[str]) -> list[str]:
    """The names that reward functions have in metrics: the function's own name, made unique if two
    are the same.
    """
    short = [name.rpartition(":")[2] for name in names]
    if len(set(short)) < len(short):
        short = [n if short.count(s) > 1 else s for n, s in zip(names, short, strict=True)]
    return [
        name if short.count(name) == 1 else f"{name}_{short[: index + 1].count(name)}"
        for index, name in enumerate(short)
    ]
