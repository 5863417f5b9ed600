"""Tables of the built-in rewards with their options, and of the arguments that the trainer passes
to every reward. A test compares the tables with ``toolkit.train.rewards``.
"""

from __future__ import annotations

# For each built-in reward: its options, and whether each option is required.
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

# The arguments that TRL 1.16 passes to every reward in addition to the columns of the dataset
# (GRPOTrainer._calculate_rewards). A column with one of these names does not reach the rewards.
ALWAYS_PASSED = (
    "prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric",
)  # fmt: skip
# Names of columns that are never passed to a reward, and the reason.
WITHHELD_COLUMNS = {
    **dict.fromkeys(
        ALWAYS_PASSED, "the trainer itself passes an argument with the name {name} to every reward"
    ),
    **dict.fromkeys(
        ("image", "images"),
        "the trainer would read this column as images, but the toolkit trains only on text",
    ),
    "completion": "the trainer uses this name for its own completions",
}
# All arguments that TRL may pass to a reward. TRL passes ``environments`` only if the run has
# environments.
PASSED_BY_TRL = frozenset((*ALWAYS_PASSED, "environments"))


def reward_metric_names(names: list[str]) -> list[str]:
    """Return the name that each reward function in ``names`` has in the metrics. Usually this is
    the function's name without its module. If several functions have the same name, the module or a
    number is added.
    """
    short_names = [name.rpartition(":")[2] for name in names]
    if len(set(short_names)) < len(short_names):
        short_names = [
            n if short_names.count(s) > 1 else s for n, s in zip(names, short_names, strict=True)
        ]
    return [
        name if short_names.count(name) == 1 else f"{name}_{short_names[: index + 1].count(name)}"
        for index, name in enumerate(short_names)
    ]
