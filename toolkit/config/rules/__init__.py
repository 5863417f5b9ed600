"""All rules on a run file, by topic. Each rule is one small function."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from toolkit.config.rules.run import DeviceFacts, Run, Situation
from toolkit.config.rules.violation import RULES, Rule

__all__ = ["RULES", "DeviceFacts", "Rule", "Run", "Situation", "all_rules", "rules_with_checks"]

_TOPICS = (
    "batch", "batch_auto", "rows", "sampling", "generation_kwargs", "training", "schedule",
    "scheduler", "optimizer", "packages", "evaluation", "trainer", "lengths", "lora", "lora_engine",
    "lora_layers", "lora_start", "experts", "loading", "tensor_parallel", "kv_cache", "features",
    "model_files", "hardware", "keys", "secrets", "rewards", "environment", "data",
    "data_columns", "runtime", "structural",
)  # fmt: skip


@cache
def all_rules() -> dict[str, Rule]:
    """Return all rules as a mapping from id to rule, ordered by topic."""
    for topic in _TOPICS:
        import_module(f"toolkit.config.rules.{topic}")
    return RULES


@cache
def rules_with_checks() -> tuple[Rule, ...]:
    """Return the rules that have a function to check a run. The other rules are only texts about
    faults that are found while the run file is read.
    """
    from toolkit.config.rules.structural import RULE_TEXTS  # noqa: PLC0415 - registers rules after all topics

    return tuple(rule for name, rule in all_rules().items() if name not in RULE_TEXTS)
