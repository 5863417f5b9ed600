"""Rules on keys that transformers' trainer, accelerate and torch read: which values they accept."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.base.capability import BFLOAT16
from toolkit.base.did_you_mean import nearest
from toolkit.config.finding import Fix
from toolkit.config.rules.hardware import capability_problem
from toolkit.config.rules.violation import RuleViolation, rule
from toolkit.config.trl_names import (
    ACCELERATOR_KEYS,
    BATCHING_KEYS,
    CACHE_IMPLEMENTATIONS,
    COMPILE_BACKENDS,
    COMPILE_MODES,
    DEBUG_OPTIONS,
    ROUTER_LOGIT_TYPES,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toolkit.config.document import Node
    from toolkit.config.rules.run import Run

ROUTER_LOSS = "grpo.router_aux_loss_coef"
WORKERS = "grpo.dataloader_num_workers"
ACCELERATOR_CONFIG = "grpo.accelerator_config"
_BACKEND, _MODE = "grpo.torch_compile_backend", "grpo.torch_compile_mode"


@rule(
    "GRPO044",
    f"{ROUTER_LOSS} model.model_name",
    example="""
model:
  model_name: Qwen/Qwen3-0.6B  # dense
grpo:
  router_aux_loss_coef: 0.001
""",
    fix="router_aux_loss_coef: null",
)
def router_loss_needs_a_router(run: Run) -> Iterator[RuleViolation]:
    """router_aux_loss_coef above 0 needs a mixture of experts that returns its router's logits.

    The auxiliary loss balances the experts and is computed from these logits. The rule is checked
    if the model is on this machine.
    """
    coefficient = run.value(ROUTER_LOSS)
    if not coefficient or run.model is None:
        return
    family = str(run.model.text_config.get("model_type") or run.model.config.get("model_type"))
    if run.model.is_mixture_of_experts and (
        family in ROUTER_LOGIT_TYPES or "output_router_logits" in run.model.text_config
    ):
        return
    reason = (
        "does not return its router's logits"
        if run.model.is_mixture_of_experts
        else "has no experts"
    )
    yield RuleViolation(
        ROUTER_LOSS,
        f"this model has no auxiliary loss, because {family} {reason}",
        notes=(f"from {run.model.source}",),
        fixes=(run.set_fix(ROUTER_LOSS, None),),
        related=("model.model_name",),
    )


@rule(
    "GRPO045",
    f"grpo.dataloader_persistent_workers grpo.dataloader_multiprocessing_context {WORKERS}",
    example="grpo:\n  dataloader_persistent_workers: true",
    fix="dataloader_num_workers: 1",
)
def worker_keys_need_workers(run: Run) -> Iterator[RuleViolation]:
    """dataloader_persistent_workers and dataloader_multiprocessing_context need
    dataloader_num_workers above 0.

    The two keys configure the worker processes that load data. torch refuses the keys if there are
    no worker processes.
    """
    if run.value(WORKERS) != 0:
        return
    for name, off_value in (("persistent_workers", False), ("multiprocessing_context", None)):
        key = f"grpo.dataloader_{name}"
        if run.get(key) != off_value:
            yield RuleViolation(
                key,
                "has no effect without worker processes",
                notes=(run.describe(WORKERS),),
                fixes=(run.set_fix(key, off_value), run.set_fix(WORKERS, 1)),
                related=(WORKERS,),
            )


@rule(
    "GRPO046",
    ACCELERATOR_CONFIG,
    example="grpo:\n  accelerator_config: {split_batch: true}",
    fix="remove accelerator_config",
)
def accelerator_config_fits(run: Run) -> Iterator[RuleViolation]:
    """accelerator_config has only keys of accelerate, and does not turn on options that GRPO cannot
    use.

    split_batches would split the batch that TRL has already split. dispatch_batches sends tensors
    from the first process, but GRPO's batches are texts. use_configured_state needs an Accelerator
    that was created before the run. gradient_accumulation_kwargs.num_steps is replaced by
    grpo.gradient_accumulation_steps.
    """
    node = run.node(ACCELERATOR_CONFIG)
    if node is None or not isinstance(node.value, dict):
        return
    for name, member in node.value.items():
        path = ("grpo", "accelerator_config", name)
        if name not in ACCELERATOR_KEYS:
            yield _unknown_member(run, path, name, member)
        elif not isinstance(member.value, ACCELERATOR_KEYS[name]):
            yield RuleViolation(path, f"must be true or false, got {member.value!r}")
        elif member.value is True and name in _REFUSED_OPTIONS:
            yield RuleViolation(
                path, _REFUSED_OPTIONS[name], fixes=(run.replace_fix(member, False),)
            )
        elif name == "gradient_accumulation_kwargs" and member.value:
            yield RuleViolation(
                path,
                "the trainer accumulates gradients itself: set grpo.gradient_accumulation_steps",
                fixes=(Fix("remove gradient_accumulation_kwargs"),),
            )


_REFUSED_OPTIONS = {
    "split_batches": "would split batches that are already split, and separate completions of a "
    "prompt",
    "dispatch_batches": "sends tensors between processes, but GRPO's batches are texts",
    "use_configured_state": "needs an Accelerator that was created before the run",
}


def _unknown_member(run: Run, path: tuple[str, ...], name: str, member: Node) -> RuleViolation:
    suggestion = nearest(name, tuple(ACCELERATOR_KEYS))
    return RuleViolation(
        path,
        f"accelerate has no key {name}",
        notes=(f"its keys: {', '.join(ACCELERATOR_KEYS)}",),
        fixes=(run.rename_fix(member, suggestion) if suggestion else Fix(f"remove {name}"),),
        on_key=True,
    )


@rule(
    "GRPO047",
    "grpo.debug",
    example="grpo:\n  debug: underflow",
    fix="debug: underflow_overflow",
)
def debug_options_are_known(run: Run) -> Iterator[RuleViolation]:
    """debug is underflow_overflow or empty.

    transformers' other option, tpu_metrics_debug, is for TPUs.
    """
    node = run.node("grpo.debug")
    if node is None or not run.is_set("grpo.debug"):
        return
    nodes = node.value if isinstance(node.value, list) else [node]
    for index, item in enumerate(nodes):
        is_item = item is not node
        path = ("grpo", "debug", index) if is_item else ("grpo", "debug")
        words = [item.value] if is_item else str(item.value or "").split()
        for word in words:
            if word == DEBUG_OPTIONS[0]:
                continue
            reason = "is for TPUs" if word == DEBUG_OPTIONS[1] else "is not a debug option"
            is_misspelled = str(word) and DEBUG_OPTIONS[0].startswith(str(word)[:5].lower())
            spelling_fix = (
                run.replace_fix(item, DEBUG_OPTIONS[0])
                if is_item
                else run.set_fix("grpo.debug", DEBUG_OPTIONS[0])
            )
            fix = spelling_fix if is_misspelled else Fix(f"remove {word or 'the empty item'}")
            yield RuleViolation(path, f"{word} {reason}", fixes=(fix,))


@rule(
    "GRPO048",
    f"{_BACKEND} {_MODE} grpo.torch_compile",
    example="grpo:\n  torch_compile_backend: inductr",
    fix="torch_compile_backend: inductor",
)
def compiler_is_known(run: Run) -> Iterator[RuleViolation]:
    """torch_compile_backend is a backend of accelerate, and torch_compile_mode is a mode of torch.

    Each of the two keys turns torch_compile on. Only the backend inductor has modes.
    """
    for key, legal_names in ((_BACKEND, COMPILE_BACKENDS), (_MODE, COMPILE_MODES)):
        name = run.get(key)
        if name is None or str(name).lower() in legal_names:
            continue
        yield RuleViolation(
            key,
            f"{name} is not one of {', '.join(legal_names)}",
            fixes=(run.set_fix(key, nearest(str(name), legal_names)),),
        )
    backend = run.get(_BACKEND)
    if run.get(_MODE) is not None and backend is not None and backend != "inductor":
        yield RuleViolation(
            _MODE,
            f"{backend} has no modes",
            notes=(run.describe(_BACKEND),),
            fixes=(run.set_fix(_MODE, None), run.set_fix(_BACKEND, "inductor")),
            related=(_BACKEND,),
        )


@rule(
    "GRPO049",
    "grpo.tf32",
    example="grpo:\n  tf32: true  # with --gpu none",
    fix="tf32: false",
)
def tf32_needs_a_card(run: Run) -> Iterator[RuleViolation]:
    """tf32 needs compute capability 8.0 or above.

    TensorFloat-32 is a format of Ampere GPUs and newer. `envcheck validate` checks the rule only
    with --gpu.
    """
    problem = capability_problem(run, BFLOAT16) if run.value("grpo.tf32") else None
    if problem:
        yield RuleViolation(
            "grpo.tf32", f"cannot be used: {problem}", fixes=(run.set_fix("grpo.tf32", False),)
        )


@rule(
    "GRPO050",
    "grpo.cache_implementation",
    example="grpo:\n  cache_implementation: statik",
    fix="cache_implementation: static",
)
def cache_is_known(run: Run) -> Iterator[RuleViolation]:
    """cache_implementation is a cache of transformers. The offloaded caches need a GPU.

    The key is read only if transformers generates (runtime.engine: transformers). Whether there is
    a GPU is checked with --gpu.
    """
    key = "grpo.cache_implementation"
    name = run.value(key)
    if name is None:
        return
    if name not in CACHE_IMPLEMENTATIONS:
        suggestion = nearest(str(name), CACHE_IMPLEMENTATIONS)
        yield RuleViolation(
            key,
            f"{name} is not a cache of transformers",
            notes=(f"legal values: {', '.join(CACHE_IMPLEMENTATIONS)}",),
            fixes=(run.set_fix(key, suggestion),),
        )
        return
    problem = capability_problem(run, (0, 0)) if name.startswith("offloaded") else None
    if problem:
        yield RuleViolation(
            key, f"{name} cannot be used: {problem}", fixes=(run.set_fix(key, None),)
        )


@rule(
    "GRPO051",
    "grpo.transformers_continuous_batching_config",
    example="""
grpo:
  use_transformers_continuous_batching: true
  transformers_continuous_batching_config: {block_sise: 64}
""",
    fix="transformers_continuous_batching_config: {block_size: 64}",
)
def batching_keys_are_known(run: Run) -> Iterator[RuleViolation]:
    """transformers_continuous_batching_config has only keys of ContinuousBatchingConfig.

    An unknown key would end the run when the trainer is created.
    """
    name = "transformers_continuous_batching_config"
    node = run.node(f"grpo.{name}")
    if node is None or not isinstance(node.value, dict):
        return
    for key, member in node.value.items():
        if key in BATCHING_KEYS:
            continue
        suggestion = nearest(key, BATCHING_KEYS)
        yield RuleViolation(
            ("grpo", name, key),
            f"{key} is not a key of transformers' ContinuousBatchingConfig",
            notes=(f"its keys: {', '.join(BATCHING_KEYS)}",),
            fixes=(run.rename_fix(member, suggestion) if suggestion else Fix(f"remove {key}"),),
            on_key=True,
        )
