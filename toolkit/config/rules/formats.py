"""The number format of the trainer compared with that of the engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.config.rules.violation import RuleViolation, rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toolkit.config.rules.run import Run

FORMATS = {"grpo.bf16": "bfloat16", "grpo.fp16": "float16"}


@rule(
    "RUN020",
    "grpo.bf16 grpo.fp16 model.dtype runtime.engine",
    example="model: {dtype: float32}\ngrpo: {bf16: true}\nruntime: {engine: vllm}",
    fix="bf16: false",
)
def one_format_with_the_engine(run: Run) -> Iterator[RuleViolation]:
    """With the vLLM engine, the trainer computes in the format that the engine samples in.

    A float32 engine with a bfloat16 trainer samples a slightly different policy than it trains: the
    log-probabilities differ by 3e-3 to 6e-3 nats per token instead of 1e-6. Without the engine the
    trained model also samples, in one format. GRPO023 covers two different 16-bit formats.
    """
    if run.engine != "vllm" or run.ask("model.dtype") != "float32":
        return
    for key, name in FORMATS.items():
        if run.ask(key):
            yield RuleViolation(
                key,
                f"the trainer would compute in {name}, but the engine samples in float32",
                notes=(run.operand("model.dtype"), run.operand("runtime.engine")),
                fixes=(run.to(key, False), run.to("model.dtype", name)),
                related=("model.dtype",),
            )
