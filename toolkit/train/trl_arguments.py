"""TRL's GRPOConfig from a resolved run: what the run file says, and what this machine decides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from toolkit.base.errors import ConfigError, MissingExtraError, first_line
from toolkit.config.build import thaw
from toolkit.config.resolved import resolve_run
from toolkit.config.schemas import find_schema
from toolkit.config.trl_names import installed, needed_packages
from toolkit.policy.machine_facts import situation
from toolkit.train.upstream_errors import config_fault

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from toolkit.config.run_config import RunConfig
    from toolkit.config.trl_names import Package

OURS = ("max_prompt_length",)
"""Keys of the run file's ``grpo`` part that TRL 1.16 does not have."""
ENGINE_KEYS = ("use_vllm", "vllm_mode")
"""What ``runtime.engine`` decides; TRL would build an engine of its own from them."""


def grpo_config(
    config: RunConfig, run_dir: Path, build: Callable[..., Any], *, has_eval: bool
) -> Any:
    """``build`` is TRL's GRPOConfig. Metrics are logged every step, by us; TRL writes nothing.

    Raises:
        ConfigError: TRL refuses a value.
    """
    written = {
        k: _as_typed(k, thaw(v)) for k, v in config.grpo.items() if k not in (*OURS, *ENGINE_KEYS)
    }
    on_cpu = not torch.cuda.is_available()
    run = resolve_run(config, situation())
    half = run.dtype  # what the engine samples in
    written_half = written.get("bf16") or written.get("fp16")
    uploads = written.get("log_completions_hub_repo") is not None
    defaults = {
        "save_strategy": "steps",
        # TRL takes bf16 for granted where neither is said, and refuses both.
        "bf16": half == "bfloat16" and not written_half,
        "fp16": half == "float16" and not written_half,
        # The policy has switched it on or off already (lora.use_gradient_checkpointing).
        "gradient_checkpointing": False,
        # Every adapter has a part in every loss. transformers 5.17 has DDP look for those that have
        # none, a walk through the graph at each step, for all but its own class of models.
        "ddp_find_unused_parameters": False,
    }
    if written.get("eval_strategy", "no") != "no" and not has_eval:
        raise ConfigError(
            f"grpo.eval_strategy is {written['eval_strategy']} and there is no data to evaluate on",
            where=config.source or "grpo.eval_strategy",
            fix="name dataset.eval_path or dataset.eval_split, or leave eval_strategy out",
        )
    forced = {
        "output_dir": str(run_dir),
        "report_to": [],  # train/tracking calls the trackers, each beside the run
        "logging_strategy": "steps",
        "logging_steps": 1,
        "disable_tqdm": True,
        # completions.jsonl is ours (runtime.log_completions); the table that TRL makes is what it
        # uploads, and nothing of it is printed.
        "log_completions": uploads,
        "push_to_hub": False,
        "use_cpu": on_cpu,
        # transformers looks for the tokens in what the data loader gives, which is prompts; with it
        # every row would also carry "train_runtime", the mark of the summary at a run's end.
        "include_num_input_tokens_seen": "no",
        # The process group exists before (engine/process_group). transformers would look for one
        # of another kind, and fails where there is one process.
        "ddp_backend": None,
        "remove_unused_columns": False,  # rewards read columns that the model does not
        # There is no compute_metrics that these could be for, and collecting them fails.
        "include_for_metrics": [],
        "reward_weights": [function.weight for function in config.reward.functions] or None,
    }
    if run.engine == "vllm":  # rule KEY008 says that it has no effect then
        forced["use_transformers_continuous_batching"] = False
    if uploads:
        forced["num_completions_to_print"] = 0
    try:
        return build(**{**defaults, **written, **forced})
    except (TypeError, ValueError) as problem:
        where = config.source or "grpo"
        known = config_fault(problem, written, where)
        if known is not None:
            raise known from problem
        raise ConfigError(
            f"TRL refuses the grpo section: {first_line(problem)}",
            where=where,
            fix="run `envcheck validate` on the run file",
        ) from problem


def _as_typed(name: str, value: Any) -> Any:
    """``value`` with the number type of TRL's own default, and none for no trackers.

    A whole number that is written for a float is one to a run file (``adam_beta1: 0``) and none to
    torch, which wants both betas of one type.
    """
    if name == "report_to" and value is None:
        return []
    wanted = find_schema("run")["properties"]["grpo"]["properties"].get(name, {}).get("default")
    return float(value) if isinstance(wanted, float) and type(value) is int else value


def require_packages(config: RunConfig) -> None:
    """What the grpo section needs is installed; looked at before anything is loaded.

    Raises:
        MissingExtraError: a tracker, an optimizer or Liger that is not.
    """
    asked = config.grpo.get("report_to")
    trackers = [asked] if isinstance(asked, str) else thaw(asked or ())
    needed = needed_packages(
        trackers,
        config.grpo.get("optim", ""),
        use_liger=bool(config.grpo.get("use_liger_kernel")),
        cache=config.grpo.get("cache_implementation"),
    )
    refuse_missing(needed, config.source)


def refuse_missing(needed: Iterable[tuple[str, str, Package]], source: str | None = None) -> None:
    """``needed`` is what ``needed_packages`` gave; ``source`` the run file that asks for it.

    Raises:
        MissingExtraError: for the first package that is not installed.
    """
    for key, value, package in needed:
        if not installed(package):
            raise MissingExtraError(
                f"grpo.{key}: {value} needs {package.install}, which is not installed",
                where=source or f"grpo.{key}",
                fix=f"pip install {package.install}, or change grpo.{key}",
            )


def make_reproducible() -> None:
    """Deterministic kernels where there is a choice.

    On the CPU results are equal for equal thread counts without it. On a GPU this covers cuBLAS and
    cuDNN; scatter-adds that have no deterministic form only warn.
    """
    if torch.cuda.is_available():
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
