"""Rules on keys that a run file may not set, keys without effect, and keys that were renamed."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from toolkit.config.chat_format import resolve_chat
from toolkit.config.data_facts import read_data_facts
from toolkit.config.engine_settings import OPTIONS
from toolkit.config.environments import MULTI_TURN_ADAPTERS
from toolkit.config.finding import Fix, Severity
from toolkit.config.key_moves import move_fix, removal_fix
from toolkit.config.message_text import show_value
from toolkit.config.migration import FORCED_KEYS, INERT_KEYS, MOVED_KEYS, convert_key
from toolkit.config.rules.evaluation import METRIC_SCHEDULES, has_evaluation_data
from toolkit.config.rules.violation import RuleViolation, rule
from toolkit.config.schemas import find_schema

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toolkit.config.rules.run import Run

_VLLM_ONLY = ("vllm_structured_outputs_regex",)
# Keys that only Hugging Face generation reads.
_TRANSFORMERS_ONLY = (
    "cache_implementation", "use_transformers_continuous_batching",
    "transformers_continuous_batching_config",
)  # fmt: skip
# (key, the second key that turns it on, the value that the second key must have)
_CONDITIONAL_KEYS = (
    ("grpo.eval_steps", "grpo.eval_strategy", "steps"),
    ("grpo.save_steps", "grpo.save_strategy", "steps"),
    ("grpo.ref_model_sync_steps", "grpo.sync_ref_model", True),
    ("grpo.ref_model_mixup_alpha", "grpo.sync_ref_model", True),
    ("grpo.sapo_temperature_neg", "grpo.loss_type", "sapo"),
    ("grpo.sapo_temperature_pos", "grpo.loss_type", "sapo"),
    ("grpo.vespo_k_pos", "grpo.loss_type", "vespo"),
    ("grpo.vespo_k_neg", "grpo.loss_type", "vespo"),
    ("grpo.vespo_lambda_pos", "grpo.loss_type", "vespo"),
    ("grpo.vespo_lambda_neg", "grpo.loss_type", "vespo"),
    ("grpo.max_resample_times", "grpo.dynamic_sampling", True),
    ("grpo.curriculum_share", "grpo.curriculum", True),
    ("grpo.entropy_target", "grpo.use_adaptive_entropy", True),
    ("grpo.entropy_coef_min", "grpo.use_adaptive_entropy", True),
    ("grpo.entropy_coef_max", "grpo.use_adaptive_entropy", True),
    ("grpo.entropy_coef_delta", "grpo.use_adaptive_entropy", True),
    ("grpo.liger_kernel_config", "grpo.use_liger_kernel", True),
    ("grpo.log_unique_prompts", "grpo.log_completions", True),
    ("grpo.log_multimodal", "grpo.log_completions", True),
    (
        "grpo.transformers_continuous_batching_config",
        "grpo.use_transformers_continuous_batching",
        True,
    ),
)
_TOOL_ITERATIONS = "grpo.max_tool_calling_iterations"
_EVALUATION_KEYS = (
    "eval_delay", "per_device_eval_batch_size", "num_generations_eval", "eval_accumulation_steps",
    "eval_use_gather_object", "bf16_full_eval", "fp16_full_eval",
)  # fmt: skip
_TRACKER_KEYS = ("run_name", "project")
_TRACKIO_KEYS = ("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")
_SCHEDULES_WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
_REFUSED_ELSEWHERE = ("parallelism_config",)


@rule(
    "KEY007",
    "grpo",
    example="grpo:\n  use_vllm: true",
    fix="runtime.engine: vllm",
)
def no_refused_keys(run: Run) -> Iterator[RuleViolation]:
    """A run file does not set fields of GRPOConfig that the toolkit sets itself or does not
    support.

    The engine, the run folder, resuming and model loading have their own keys outside the section
    grpo. If two keys set the same thing, one of them would be silently ignored.
    """
    grpo = run.node("grpo")
    if grpo is None or not isinstance(grpo.value, dict):
        return
    properties = find_schema("run")["properties"]["grpo"]["properties"]
    for name, node in grpo.value.items():
        refused = properties.get(name, {}).get("x-refused")
        if refused is None or name in _REFUSED_ELSEWHERE or f"grpo.{name}" in MOVED_KEYS:
            continue
        replacement = refused["use"]
        yield RuleViolation(
            ("grpo", name),
            f"cannot be set in a run file: {refused['why']}",
            fixes=(_migration_fix(run, f"grpo.{name}", replacement),),
            on_key=node.key_position is not None,
        )


@rule(
    "KEY008",
    "lora model grpo dataset runtime",
    example="runtime:\n  engine: transformers\nmodel:\n  max_lora_rank: 64",
    fix="remove the key, or change the setting that makes the key ineffective",
    severity=Severity.WARNING,
)
def keys_without_effect(run: Run) -> Iterator[RuleViolation]:
    """Every key that is set must have an effect.

    For example, LoRA keys have no effect with full_finetuning. Keys of the vLLM engine have no
    effect with engine: transformers. Some other keys have an effect only if a second key is on. A
    key without effect misleads the reader of the run file.
    """
    ineffective_keys = (
        _unused_by_engine(run),
        _disabled_by_other_keys(run),
        _unused_evaluation_keys(run),
        _unused_tracker_keys(run),
    )
    for key, reason in (*chain(*ineffective_keys), *FORCED_KEYS.items(), *INERT_KEYS.items()):
        if run.node(key) is not None and not (key == _TOOL_ITERATIONS and is_multi_turn(run)):
            yield RuleViolation(key, f"has no effect: {reason}", on_key=True)
    for key, switch, required_value in _CONDITIONAL_KEYS:
        if run.node(key) is not None and run.get(switch) != required_value:
            condition = f"{switch.rpartition('.')[2]} {show_value(required_value)}"
            reason = f"it needs {condition}, but the run has {run.describe(switch)}"
            yield RuleViolation(key, f"has no effect: {reason}", on_key=True)


def is_multi_turn(run: Run) -> bool:
    """Whether the model may act before it answers, by tool calls or by steps in an environment."""
    adapter = run.value("environment.adapter") if run.node("environment.adapter") else None
    return run.node("tools") is not None or adapter in MULTI_TURN_ADAPTERS


def _unused_by_engine(run: Run) -> Iterator[tuple[str, str]]:
    """Yield each key that the run's engine does not read, with the reason. Keys that the run file
    does not set are yielded too.
    """
    if run.engine == "transformers":
        key = "runtime.engine" if run.get("runtime.engine") != "auto" else "model.fast_inference"
        reason = f"{run.describe(key)}, but only the vLLM engine reads this key"
        yield from ((f"model.{name}", reason) for name in OPTIONS)
        yield from ((f"grpo.{name}", reason) for name in _VLLM_ONLY)
    elif run.engine == "vllm":
        reason = "the vLLM engine generates, but only Hugging Face generation reads this key"
        yield from ((f"grpo.{name}", reason) for name in _TRANSFORMERS_ONLY)


def _disabled_by_other_keys(run: Run) -> Iterator[tuple[str, str]]:
    if run.get("model.full_finetuning"):
        reason = f"{run.describe('model.full_finetuning')} trains all weights without an adapter"
        yield "lora", reason
    if run.get("grpo.max_steps") > 0:
        reason = f"{run.describe('grpo.max_steps')} sets the length of the run"
        yield "grpo.num_train_epochs", reason
    if run.get("dataset.eval_path") is None and run.get("dataset.eval_split") is None:
        keys = f"{run.describe('dataset.eval_path')}; {run.describe('dataset.eval_split')}"
        yield "dataset.eval_limit", f"there is no evaluation data: {keys}"
    if all(
        read_data_facts(run.document, key)
        for key in ("path", "eval_path")
        if run.get(f"dataset.{key}")
    ):
        for name in ("name", "revision"):
            yield (
                f"dataset.{name}",
                "it applies only to a hub dataset, but the data is in local files",
            )
    prompts_are_texts = not any(
        data is not None and data.has_message_lists
        for data in (read_data_facts(run.document, key) for key in ("path", "eval_path"))
    )
    if prompts_are_texts and resolve_chat(run.get("dataset.chat"), run.has_chat_template) is False:
        no_template = run.has_chat_template is False
        reason = (
            "the tokenizer has no chat template" if no_template else run.describe("dataset.chat")
        )
        yield "grpo.chat_template_kwargs", f"prompts are plain text ({reason})"
    schedule = run.get("grpo.lr_scheduler_type")
    if schedule in _SCHEDULES_WITHOUT_WARMUP:
        yield "grpo.warmup_steps", f"{run.describe('grpo.lr_scheduler_type')} has no warm-up"
    if run.get("dataset.path") is None:
        for name in ("split", "name", "revision", "limit", "eval_split"):
            yield f"dataset.{name}", "there is no dataset.path"
    if run.get("dataset.path") is None and run.node("environment") is not None:
        for name in ("prompt", "answer", "eval_limit"):
            yield f"dataset.{name}", "the environment makes the prompts and the answers"


def _unused_evaluation_keys(run: Run) -> Iterator[tuple[str, str]]:
    """Yield keys without effect, each with the reason. These are the evaluation keys if the run has
    no evaluation, and the metric keys if no setting of the run uses a metric.
    """
    has_evaluation = run.get("grpo.eval_strategy") != "no" or run.get("grpo.eval_on_start")
    if not has_evaluation and not has_evaluation_data(run):
        reason = f"evaluation is off: {run.describe('grpo.eval_strategy')}"
        yield from ((f"grpo.{name}", reason) for name in _EVALUATION_KEYS)
    schedule_uses_metric = run.get("grpo.lr_scheduler_type") in METRIC_SCHEDULES
    selects_best = run.get("grpo.save_strategy") == "best" or run.get("grpo.load_best_model_at_end")
    if not selects_best and not schedule_uses_metric:
        reason = f"the run chooses no checkpoint by a metric: {run.describe('grpo.save_strategy')}"
        yield "grpo.metric_for_best_model", reason
        yield "grpo.greater_is_better", reason
    elif run.get("grpo.metric_for_best_model") is None:
        reason = f"no metric is named: {run.describe('grpo.metric_for_best_model')}"
        yield "grpo.greater_is_better", reason


def _unused_tracker_keys(run: Run) -> Iterator[tuple[str, str]]:
    """Yield the keys that no tracker in report_to reads, each with the reason."""
    report_to = run.get("grpo.report_to") or []
    trackers = [report_to] if isinstance(report_to, str) else report_to
    reason = f"no tracker in report_to reads this key: {run.describe('grpo.report_to')}"
    if not [name for name in trackers if name != "none"]:
        yield from ((f"grpo.{name}", reason) for name in _TRACKER_KEYS)
    if "trackio" not in trackers and "all" not in trackers:
        yield from ((f"grpo.{name}", reason) for name in _TRACKIO_KEYS)


@rule(
    "KEY009",
    "model lora dataset grpo",
    example="grpo:\n  max_new_tokens: 256",
    fix="max_completion_length: 256",
)
def no_renamed_keys(run: Run) -> Iterator[RuleViolation]:
    """No key has an old name that TRL, Unsloth or PEFT has since changed.

    The toolkit does not read old names. The finding names the key that replaced the old one.
    """
    for old, moved in MOVED_KEYS.items():
        node = run.node(old)
        if node is None or (old == "grpo.warmup_ratio" and run.node("grpo.warmup_steps")):
            continue  # GRPO019 reports this fault
        yield RuleViolation(
            old,
            moved.sentence,
            fixes=(_migration_fix(run, old, moved.new_key),),
            on_key=True,
        )


def _migration_fix(run: Run, old: str, replacement: str | None) -> Fix:
    """The fix for an old key. If a current key has the same meaning, the fix edits the run file.
    Otherwise the fix is only a text.
    """
    path = tuple(old.split("."))
    node = run.document.find_node(path)
    assert node is not None
    new_setting = convert_key(old, node.value)
    if new_setting is None:
        return Fix(f"use {replacement}" if replacement else "remove the key")
    new_key, value = new_setting
    return (
        removal_fix(run.document.root, path)
        if new_key is None
        else move_fix(run.document.root, path, new_key, value)
    )
