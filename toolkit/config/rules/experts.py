"""Rules on LoRA for a mixture-of-experts model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.config.finding import Fix, Severity
from toolkit.config.lora_targets import MLP, default_targets, expert_targets
from toolkit.config.rules.violation import RuleViolation, rule

if TYPE_CHECKING:
    from collections.abc import Iterator

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

    On Qwen3-MoE and DeepSeek, PEFT applies gate_proj, up_proj and down_proj to the experts. The
    engine reserves no LoRA slots there, because they would take gigabytes. auto adapts the
    attention of a mixture-of-experts model. Without the engine experts can be trained. Checked when
    the model is on this machine.
    """
    if run.engine == "transformers" or run.model is None or run.ask("model.full_finetuning"):
        return
    targets = run.value(_TARGETS)
    if targets == "auto":
        return
    family = str(run.model.config.get("model_type"))
    found = expert_targets(family, targets) if run.model.experts else frozenset()
    if found:
        names = ", ".join(name for name in MLP if name in found)
        yield RuleViolation(
            _TARGETS,
            f"{names} are the experts of this model, and the engine has no LoRA slots for them",
            notes=(f"{run.operand('runtime.engine')}; experts from {run.model.source}",),
            fixes=(
                Fix(f"target_modules: [{', '.join(default_targets(run.model.config))}]"),
                run.to("runtime.engine", "transformers"),
            ),
            severity=Severity.ERROR if run.engine == "vllm" else Severity.WARNING,
        )
