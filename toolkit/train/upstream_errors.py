"""Find the keys of the run file that caused an exception in an upstream library.

The table ``UPSTREAM_TASKS`` lists functions of upstream libraries with the keys that they use. If
such a function raises an exception, and the run file sets some of its keys, these keys count as the
cause. The run then ends with exit code 1. All other exceptions are reported as a defect of the
toolkit. The table is for transformers 5.17, TRL 1.16 and torch 2.11 to 2.13.
tests/contract/test_train_upstream.py checks the names of files and functions in the table.
"""

from __future__ import annotations

import re
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from toolkit.base.errors import ConfigError, first_line
from toolkit.config.build_config import thaw

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

TOOLKIT_FOLDER = Path(__file__).resolve().parents[1]
MAX_NAMED_KEYS = 4
MIN_CLASS_NAME_LENGTH = 16
"""A word of the exception's text with at least this many characters may match a part of a key.
Such a word is the name of the class into which upstream reads the key: AcceleratorConfig for
``accelerator_config``.
"""


class UpstreamTask(NamedTuple):
    """A task of an upstream library, for example building the optimizer. ``description`` says what
    the task does. ``locations`` lists the source files and functions of the task. ``keys`` are the
    ``grpo`` keys that the task uses.
    """

    description: str
    locations: tuple[str, ...]
    """Each location is ``file`` or ``file:function``. A file name that ends with / means a folder.
    """
    keys: tuple[str, ...] | None
    """None means the keys that occur in the text of the exception."""


_SIZES = (
    "generation_batch_size", "gradient_accumulation_steps", "per_device_train_batch_size",
    "steps_per_generation", "num_generations", "max_steps", "num_train_epochs",
)  # fmt: skip
_LOADER = (
    "dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_persistent_workers",
    "dataloader_multiprocessing_context", "dataloader_pin_memory", "dataloader_in_order",
    "dataloader_drop_last", "accelerator_config", "train_sampling_strategy", "length_column_name",
    "data_seed", "remove_unused_columns",
)  # fmt: skip
_EVALUATION = (
    "eval_strategy", "eval_steps", "eval_on_start", "per_device_eval_batch_size",
    "num_generations_eval", "eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics",
    "label_names", "prediction_loss_only", "eval_use_gather_object", "eval_do_concat_batches",
)  # fmt: skip
_DDP = (
    "ddp_backend", "ddp_static_graph", "ddp_bucket_cap_mb", "ddp_broadcast_buffers",
    "ddp_find_unused_parameters", "ddp_timeout",
)  # fmt: skip
_COMPILE = ("torch_compile", "torch_compile_backend", "torch_compile_mode")
UPSTREAM_TASKS = (
    UpstreamTask(
        "building the learning rate schedule",
        (
            "transformers/optimization.py", "torch/optim/lr_scheduler.py",
            "transformers/trainer.py:create_scheduler",
        ),
        ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "learning_rate"),
    ),
    UpstreamTask(
        "building the optimizer",
        (
            "transformers/trainer_optimizer.py", "transformers/trainer.py:create_optimizer",
            "transformers/trainer.py:get_optimizer_cls_and_kwargs", "bitsandbytes/",
            "galore_torch/", "apollo_torch/", "schedulefree/", "lomo_optim/", "grokadamw/",
            "optimi/", "torchao/", "torchdistx/",
        ),
        (
            "optim", "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2",
            "adam_epsilon", "weight_decay", "learning_rate",
        ),
    ),
    UpstreamTask(
        "calling a tracker",
        (
            "transformers/integrations/integration_utils.py",
            "transformers/integrations/tpu.py",
        ),
        (
            "report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id",
            "trackio_static_space_id",
        ),
    ),
    UpstreamTask(
        "loading data",
        (
            "torch/utils/data/", "accelerate/data_loader.py",
            "accelerate/utils/operations.py",
            "transformers/trainer.py:_get_dataloader", "transformers/trainer.py:_get_train_sampler",
            "trl/trainer/grpo_trainer.py:get_train_dataloader", "transformers/trainer_pt_utils.py",
        ),
        _LOADER,
    ),
    UpstreamTask(
        "computing the number of steps",
        ("transformers/trainer.py:set_initial_training_values",),
        _SIZES,
    ),
    UpstreamTask(
        "comparing checkpoints",
        (
            "transformers/trainer.py:_determine_best_metric",
            "transformers/trainer.py:_load_best_model", "transformers/trainer.py:_evaluate",
        ),
        ("metric_for_best_model", "greater_is_better", "load_best_model_at_end", "save_strategy",
         "lr_scheduler_type"),
    ),
    UpstreamTask(
        "compiling the model",
        (
            "torch/_dynamo/", "torch/_inductor/", "torch/__init__.py:compile",
            "accelerate/utils/dataclasses.py:__post_init__",
        ),
        _COMPILE,
    ),
    UpstreamTask("loading Liger", ("transformers/integrations/liger.py", "liger_kernel/"),
          ("use_liger_kernel", "liger_kernel_config")),
    UpstreamTask(
        "adding noise to the embeddings",
        ("transformers/integrations/neftune.py",),
        ("neftune_noise_alpha",),
    ),
    UpstreamTask(
        "casting lm_head",
        ("trl/trainer/grpo_trainer.py:_cast_lm_head_to_fp32",),
        ("cast_lm_head_to_fp32",),
    ),
    UpstreamTask("checking for overflows", ("transformers/debug_utils.py",), ("debug",)),
    UpstreamTask(
        "generating",
        ("transformers/generation/", "transformers/cache_utils.py"),
        (
            "cache_implementation", "generation_kwargs", "use_transformers_continuous_batching",
            "transformers_continuous_batching_config",
        ),
    ),
    UpstreamTask("scaling gradients", ("torch/amp/",), ("fp16", "bf16")),
    UpstreamTask(
        "creating the process group",
        ("torch/distributed/", "torch/nn/parallel/distributed.py", "accelerate/state.py"),
        _DDP,
    ),
    UpstreamTask(
        "setting up accelerate",
        ("transformers/trainer.py:create_accelerator_and_postprocess", "accelerate/accelerator.py"),
        ("accelerator_config", *_COMPILE, *_DDP, "bf16", "fp16"),
    ),
    UpstreamTask(
        "evaluating",
        (
            "transformers/trainer.py:evaluation_loop", "transformers/trainer.py:evaluate",
            "transformers/trainer.py:get_eval_dataloader",
            "trl/trainer/grpo_trainer.py:get_eval_dataloader",
        ),
        _EVALUATION,
    ),
    UpstreamTask(
        "reading the arguments",
        (
            "transformers/training_args.py", "trl/trainer/grpo_config.py",
            "trl/trainer/base_config.py", "trl/trainer/grpo_trainer.py:__init__",
            "transformers/trainer.py:__init__", "transformers/trainer.py:_validate_args",
        ),
        None,
    ),
)  # fmt: skip


class Cause(NamedTuple):
    """The cause of an exception: the task of the upstream library, and the keys that it used."""

    description: str
    keys: tuple[str, ...]


def find_cause(error: BaseException, user_values: Mapping[str, Any]) -> Cause | None:
    """Return the cause of ``error``: the task in which a library raised it, and the keys of the run
    file that the library used for this task. Return None if no key caused ``error``.

    ``user_values`` is the ``grpo`` section of the run file. The frames of the traceback are
    searched from the innermost frame up to the first frame of the toolkit.
    """
    for file, function in _upstream_frames(error):
        for task in UPSTREAM_TASKS:
            if not any(_is_at_location(location, file, function) for location in task.locations):
                continue
            keys = _keys_in_message(error, user_values) if task.keys is None else task.keys
            keys_set = tuple(key for key in keys if key in user_values)
            if keys_set:
                return Cause(task.description, keys_set)
    return None


def as_config_error(
    error: BaseException, user_values: Mapping[str, Any], where: str
) -> ConfigError | None:
    """Return a ConfigError that replaces ``error``. Its message contains the text of ``error`` and
    the keys of the run file that caused it. Return None if no key caused ``error``.
    """
    cause = find_cause(error, user_values)
    if cause is None:
        return None
    first, *others = cause.keys[:MAX_NAMED_KEYS]
    values = "; ".join(f"grpo.{key} is {thaw(user_values[key])!r}" for key in (first, *others))
    return ConfigError(
        f"{cause.description} failed: {type(error).__name__}: {first_line(error)} ({values})",
        where=where,
        fix=f"change or remove grpo.{first}"
        + (f" (or {', '.join(f'grpo.{key}' for key in others)})" if others else "")
        + f". Use `envcheck explain grpo.{first}` to see its valid values",
    )


def _keys_in_message(error: BaseException, user_values: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keys that occur in the text of the exception. A key also counts if the text
    contains the name of its class (AcceleratorConfig for ``accelerator_config``).
    """
    words = {word.lower().replace("_", "") for word in re.findall(r"\w+", str(error))}
    joined_names = {key: key.replace("_", "") for key in user_values}
    return tuple(
        key
        for key, name in joined_names.items()
        if name in words
        or any(len(word) >= MIN_CLASS_NAME_LENGTH and word in name for word in words)
    )


def _upstream_frames(error: BaseException) -> Iterator[tuple[str, str]]:
    """Yield (file, function) for each frame of the traceback of ``error``. Begin with the innermost
    frame, and stop before the first frame of the toolkit.
    """
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_relative_to(TOOLKIT_FOLDER):
            return
        yield path.as_posix(), frame.name


def _is_at_location(location: str, file: str, function: str) -> bool:
    path, _, name = location.partition(":")
    if path.endswith("/"):
        return f"/{path}" in file
    return file.endswith(f"/{path}") and name in ("", function)
