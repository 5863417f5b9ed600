"""Rules on adapters of routed experts in a mixture-of-experts model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.config.finding import Fix, Severity
from toolkit.config.lora_targets import (
    FUSED_EXPERT_LAYERS,
    MLP_PROJECTIONS,
    default_targets,
    expert_targets,
)
from toolkit.config.rules.violation import RuleViolation, rule

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from toolkit.config.rules.run import Run

_TARGETS = "lora.target_modules"


@rule(
    "LORA013",
    f"{_TARGETS} model.model_name",
    example="""
model:
  model_name: Qwen/Qwen3-30B-A3B
runtime: {engine: vllm}
lora:
  target_modules: [q_proj, up_proj]
""",
    fix="target_modules: auto",
)
def experts_have_no_slots(run: Run) -> Iterator[RuleViolation]:
    """With the vLLM engine, routed experts cannot have an adapter.

    On Qwen3-MoE and DeepSeek, PEFT applies the targets gate_proj, up_proj and down_proj to the
    experts. Adapters on experts would take gigabytes of memory, so the engine reserves no memory
    for them. If target_modules is auto, only the attention of a mixture-of-experts model gets an
    adapter. With the transformers engine (runtime.engine: transformers), adapters on experts can be
    trained. The rule is checked if the model is on this machine.
    """
    adapted_layers = frozenset() if run.engine == "transformers" else _adapted_experts(run)
    if adapted_layers and run.model is not None:
        names = ", ".join(name for name in MLP_PROJECTIONS if name in adapted_layers)
        yield RuleViolation(
            _TARGETS,
            f"{names} are layers of the experts of this model, and experts cannot have an adapter "
            "in the vLLM engine",
            notes=(f"{run.describe('runtime.engine')}; experts from {run.model.source}",),
            fixes=(
                Fix(_targets_text(default_targets(run.model.config))),
                run.set_fix("runtime.engine", "transformers"),
            ),
            severity=Severity.ERROR if run.engine == "vllm" else Severity.WARNING,
        )


@rule(
    "LORA029",
    f"{_TARGETS} model.model_name",
    example="""
model:
  model_name: Qwen/Qwen3-30B-A3B
runtime: {engine: transformers}
lora:
  target_modules: [q_proj, gate_proj]
""",
    fix="target_modules: [q_proj, gate_proj, up_proj]",
)
def fused_expert_layers_share_an_adapter(run: Run) -> Iterator[RuleViolation]:
    """target_modules contains both gate_proj and up_proj of routed experts, or neither of them.

    transformers stores gate_proj and up_proj of an expert as one parameter, gate_up_proj. PEFT
    adapts this parameter only if both names are in target_modules. The rule is checked for the
    transformers engine if the model is on this machine. With the vLLM engine, LORA013 reports
    adapters on experts.
    """
    adapted_layers = frozenset() if run.engine == "vllm" else _adapted_experts(run)
    present = [name for name in FUSED_EXPERT_LAYERS if name in adapted_layers]
    if len(present) != 1 or run.model is None:
        return
    targets = run.value(_TARGETS)
    missing = next(name for name in FUSED_EXPERT_LAYERS if name not in adapted_layers)
    fixes = (Fix("target_modules: auto"),)
    if not isinstance(targets, str):
        with_both = (*targets, missing)
        with_neither = [name for name in targets if not name.endswith(present[0])]
        fixes = (
            Fix(_targets_text(with_both)),
            *((Fix(_targets_text(with_neither)),) if with_neither else ()),
        )
    yield RuleViolation(
        _TARGETS,
        f"target_modules contains {present[0]} but not {missing}. The experts of this model store "
        "gate_proj and up_proj as one parameter",
        notes=(f"experts from {run.model.source}",),
        fixes=fixes,
    )


def _adapted_experts(run: Run) -> frozenset[str]:
    """Return the layers of routed experts that lora.target_modules names. The result is empty if
    there are none, or if the model is not on this machine.
    """
    targets = run.value(_TARGETS)
    if run.model is None or not run.model.is_mixture_of_experts or targets == "auto":
        return frozenset()
    if run.get("model.full_finetuning"):
        return frozenset()
    return expert_targets(str(run.model.config.get("model_type")), targets)


def _targets_text(names: Iterable[str]) -> str:
    return f"target_modules: [{', '.join(names)}]"
