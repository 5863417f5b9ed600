"""Build TRL's GRPOConfig for a run. The values of its fields come from the run file or depend on
the machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from toolkit.base.errors import ConfigError, MissingExtraError, first_line
from toolkit.config.build_config import thaw
from toolkit.config.environments import missing_package, pip_command
from toolkit.config.resolved import resolve_run
from toolkit.config.schemas import find_schema
from toolkit.config.trl_names import is_installed, packages_for_grpo
from toolkit.policy.machine_facts import detect_machine
from toolkit.train.upstream_errors import as_config_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from toolkit.config.run_config import RunConfig
    from toolkit.config.trl_names import Package

TOOLKIT_KEYS = ("max_prompt_length",)
"""Keys of the run file's ``grpo`` part that TRL 1.16 does not have."""
ENGINE_KEYS = ("use_vllm", "vllm_mode")
"""Keys from which TRL would build its own engine. ``runtime.engine`` replaces these keys."""


def grpo_config(
    config: RunConfig, run_dir: Path, config_class: Callable[..., Any], *, has_eval: bool
) -> Any:
    """Return TRL's GRPOConfig for the run file ``config``. ``config_class`` is the class
    GRPOConfig. The returned config turns off all output of TRL, because the toolkit itself logs
    every step.

    Raises:
        ConfigError: TRL rejects a value.
    """
    user_values = {
        k: _as_trl_type(k, thaw(v))
        for k, v in config.grpo.items()
        if k not in (*TOOLKIT_KEYS, *ENGINE_KEYS)
    }
    on_cpu = not torch.cuda.is_available()
    resolved = resolve_run(config, detect_machine())
    engine_dtype = resolved.dtype  # the number format of the engine
    is_half_set = user_values.get("bf16") or user_values.get("fp16")
    uploads_completions = user_values.get("log_completions_hub_repo") is not None
    defaults = {
        "save_strategy": "steps",
        # TRL sets bf16 if neither bf16 nor fp16 is set, and rejects a config that sets both.
        "bf16": engine_dtype == "bfloat16" and not is_half_set,
        "fp16": engine_dtype == "float16" and not is_half_set,
        # lora.use_gradient_checkpointing has already switched it on or off.
        "gradient_checkpointing": False,
        # Every adapter weight takes part in every loss, so there are no unused parameters. For
        # models that are not a PreTrainedModel, transformers 5.17 would make DDP search for them,
        # which traverses the autograd graph at each step.
        "ddp_find_unused_parameters": False,
    }
    if user_values.get("eval_strategy", "no") != "no" and not has_eval:
        raise ConfigError(
            f"grpo.eval_strategy is {user_values['eval_strategy']}, but the run has no "
            "held-out data",
            where=config.source or "grpo.eval_strategy",
            fix="set dataset.eval_path or dataset.eval_split, or remove grpo.eval_strategy",
        )
    forced = {
        "output_dir": str(run_dir),
        "report_to": [],  # train/tracking calls the trackers, not TRL
        "logging_strategy": "steps",
        "logging_steps": 1,
        "disable_tqdm": True,
        # The toolkit writes completions.jsonl (runtime.log_completions). TRL's table is only
        # uploaded, and not printed.
        "log_completions": uploads_completions,
        "push_to_hub": False,
        "use_cpu": on_cpu,
        # transformers would count the tokens of the data loader's output, which has only prompts.
        # In addition, every log row would have "train_runtime", which marks the summary at the end
        # of a run.
        "include_num_input_tokens_seen": "no",
        # The process group already exists (engine/mesh). With this value, transformers would look
        # for another kind of group, and would fail if there is one process.
        "ddp_backend": None,
        "remove_unused_columns": False,  # rewards read columns that the model does not use
        # Only compute_metrics uses these values. GRPO has no compute_metrics, and collecting the
        # values fails.
        "include_for_metrics": [],
        "reward_weights": [function.weight for function in config.reward.functions] or None,
    }
    if resolved.engine == "vllm":  # no effect with vLLM, as rule KEY008 reports
        forced["use_transformers_continuous_batching"] = False
    if uploads_completions:
        forced["num_completions_to_print"] = 0
    try:
        return config_class(**{**defaults, **user_values, **forced})
    except (TypeError, ValueError) as error:
        where = config.source or "grpo"
        config_error = as_config_error(error, user_values, where)
        if config_error is not None:
            raise config_error from error
        raise ConfigError(
            f"TRL rejects the grpo section: {first_line(error)}",
            where=where,
            fix="correct the grpo section. Use `envcheck validate` to check the run file",
        ) from error


def _as_trl_type(name: str, value: object) -> Any:
    """Return ``value`` as a float if TRL's default for the field ``name`` is a float. A run file
    may contain an integer here (``adam_beta1: 0``), but torch needs two betas of the same type.

    If ``name`` is ``report_to`` and ``value`` is None, the result is an empty list.
    """
    if name == "report_to" and value is None:
        return []
    default = find_schema("run")["properties"]["grpo"]["properties"].get(name, {}).get("default")
    return float(value) if isinstance(default, float) and type(value) is int else value


def require_packages(config: RunConfig) -> None:
    """Check that the packages for the sections ``grpo`` and ``environment`` are installed. Call
    this function before anything is loaded.

    Raises:
        MissingExtraError: the package of a tracker, an optimizer, Liger or an environment is not
            installed.
    """
    refuse_missing_packages(packages_for_grpo(config.grpo), config.source)
    environment = config.environment
    missing_extra = environment and missing_package(environment.adapter, environment.python)
    if environment and missing_extra:
        raise MissingExtraError(
            f"environment.adapter: {environment.adapter} needs the package "
            f"{missing_extra.modules[0]}, which is not installed"
            f"{' in ' + environment.python if environment.python else ''}",
            where=config.source or "environment.adapter",
            fix=pip_command(missing_extra, environment.python),
        )


def refuse_missing_packages(
    requirements: Iterable[tuple[str, str, Package]], source: str | None = None
) -> None:
    """Check that the packages of ``requirements`` (the result of ``needed_packages``) are
    installed. ``source`` is the path of the run file, for the error.

    Raises:
        MissingExtraError: a package is not installed. The message contains the first such package.
    """
    for key, value, package in requirements:
        if not is_installed(package):
            raise MissingExtraError(
                f"grpo.{key}: {value} needs {package.install}, which is not installed",
                where=source or f"grpo.{key}",
                fix=f"pip install {package.install}, or change grpo.{key}",
            )


def make_reproducible() -> None:
    """Make torch use deterministic kernels on a GPU, if they exist.

    This function makes cuBLAS and cuDNN deterministic. Some operations (for example some
    scatter-adds) have no deterministic kernel, and torch only prints a warning for them. On the
    CPU, this function does nothing: runs with the same number of threads always have equal results.
    """
    if torch.cuda.is_available():
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
