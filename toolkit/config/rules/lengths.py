"""Rules on lengths. Prompt and completion must fit into max_seq_length, and max_seq_length must not
exceed the model's maximum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.config.finding import Severity
from toolkit.config.rules.violation import RuleViolation, rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toolkit.config.rules.run import Run

_CONTEXT = "model.max_seq_length"
_PROMPT = "grpo.max_prompt_length"
_COMPLETION = "grpo.max_completion_length"


@rule(
    "LEN001",
    f"{_CONTEXT} {_PROMPT} {_COMPLETION}",
    example="""
model:
  max_seq_length: 1024
grpo:
  max_prompt_length: 512
  max_completion_length: 1024
""",
    fix="max_seq_length: 1536, or max_completion_length: 512",
)
def prompt_and_completion_fit(run: Run) -> Iterator[RuleViolation]:
    """max_prompt_length + max_completion_length is at most max_seq_length.

    The engine supports at most max_seq_length tokens per sequence. If max_prompt_length is not set,
    max_completion_length must leave at least one token for a prompt. TRL removed max_prompt_length
    in 0.28, but the toolkit supports it. Longer prompts are truncated from the left, and the run
    reports the number of truncated prompts.
    """
    context, prompt, completion = run.value(_CONTEXT), run.value(_PROMPT), run.value(_COMPLETION)
    needed = (prompt or 1) + completion
    if needed <= context:
        return
    if prompt is None:
        message = f"{completion} leaves no room for a prompt in max_seq_length {context}"
        arithmetic = f"{run.describe(_COMPLETION)} + a prompt of at least 1 token = {needed}"
    else:
        message = f"{prompt} plus max_completion_length {completion} is more than max_seq_length"
        arithmetic = f"{run.describe(_PROMPT)} + {run.describe(_COMPLETION)} = {needed}"
    fixes = []
    if _fits_model(run, needed):
        fixes.append(run.set_fix(_CONTEXT, needed if prompt else completion + 256))
    if prompt is not None and context > completion:
        fixes.append(run.set_fix(_PROMPT, context - completion))
    remaining_tokens = context - (prompt or min(256, context // 2))
    if remaining_tokens > 0:
        fixes.append(run.set_fix(_COMPLETION, remaining_tokens))
    reported_key = next(
        (key for key in (_PROMPT, _COMPLETION) if prompt and run.is_set(key)), _COMPLETION
    )
    yield RuleViolation(
        reported_key,
        f"{message} {context}" if prompt else message,
        notes=(f"{arithmetic} > {run.describe(_CONTEXT)}",),
        fixes=tuple(sorted(fixes, key=lambda fix: not fix.edits)),
        related=(_COMPLETION, _CONTEXT),
    )


def _fits_model(run: Run, length: int) -> bool:
    return run.model is None or run.model.max_length is None or length <= run.model.max_length


MAX_CONTEXT_RATIO = 4


@rule(
    "LEN010",
    f"{_CONTEXT} {_PROMPT} {_COMPLETION}",
    example="""
model:
  max_seq_length: 32768
grpo:
  max_prompt_length: 512
  max_completion_length: 512
""",
    fix="max_seq_length: 1024",
)
def context_is_not_oversized(run: Run) -> Iterator[RuleViolation]:
    """max_seq_length is not much larger than prompt and completion together.

    The engine reserves KV cache for at least one sequence of max_seq_length tokens. The engine's
    tables and prefill passes also have room for max_seq_length tokens. A sequence of the run never
    has more than max_prompt_length + max_completion_length tokens. A max_seq_length above 4 times
    this sum is a warning. The rule is checked if max_prompt_length is set. It is not checked with
    tools, whose descriptions are part of the prompt but not of max_prompt_length.
    """
    context, prompt, completion = run.value(_CONTEXT), run.value(_PROMPT), run.value(_COMPLETION)
    has_tools = run.node("tools") is not None or run.get("environment.adapter") == "openenv"
    if not prompt or has_tools or run.engine == "transformers" or not run.is_set(_CONTEXT):
        return
    needed = prompt + completion
    if context > MAX_CONTEXT_RATIO * needed:
        yield RuleViolation(
            _CONTEXT,
            f"{context} tokens are {context // needed} times the longest sequence of the run: the "
            "engine reserves KV cache and tables that are never used",
            notes=(f"{run.describe(_PROMPT)} + {run.describe(_COMPLETION)} = {needed}",),
            fixes=(run.set_fix(_CONTEXT, needed),),
            related=(_PROMPT, _COMPLETION),
            severity=Severity.WARNING,
        )


@rule(
    "LEN002",
    _CONTEXT,
    example="model:\n  model_name: HuggingFaceTB/SmolLM2-135M\n  max_seq_length: 16384",
    fix="max_seq_length: 8192",
)
def context_fits_model(run: Run) -> Iterator[RuleViolation]:
    """max_seq_length is at most the model's maximum length.

    The maximum is max_position_embeddings in the model's config.json. A linear, dynamic or YaRN
    rope scaling in config.json multiplies the maximum by its factor. The rule is checked if the
    model is on this machine.
    """
    model = run.model
    if model is None or model.max_length is None:
        return
    context = run.value(_CONTEXT)
    if context > model.max_length:
        yield RuleViolation(
            _CONTEXT,
            f"{context} tokens are more than this model's maximum of {model.max_length} tokens",
            notes=(f"{model.max_length_key} in {model.source}",),
            fixes=(run.set_fix(_CONTEXT, model.max_length),),
            related=("model.model_name",),
        )


@rule(
    "LEN003",
    f"{_CONTEXT} model.model_name runtime.engine",
    example="""
model:
  model_name: microsoft/Phi-3-mini-128k-instruct
  max_seq_length: 8192
runtime: {engine: vllm}
""",
    fix="max_seq_length: 4096, or runtime.engine: transformers",
)
def one_rope_for_all_lengths(run: Run) -> Iterator[RuleViolation]:
    """With the vLLM engine, max_seq_length of a LongRoPE model (Phi-3) is at most the model's
    original_max_position_embeddings.

    If max_seq_length is larger, vLLM uses the long rope factors for every sequence. The trainer
    uses the long factors only for a sequence that is longer than original_max_position_embeddings.
    The run would sample a different policy than it trains. The rule is checked if the model is on
    this machine.
    """
    model = run.model
    if run.engine == "transformers" or model is None or model.longrope_original_length is None:
        return
    original = model.longrope_original_length
    context = run.value(_CONTEXT)
    if context > original:
        yield RuleViolation(
            _CONTEXT,
            f"{context} is more than original_max_position_embeddings ({original}): vLLM would use "
            "the long rope factors for every sequence, but the trainer only for sequences of more "
            f"than {original} tokens",
            notes=(f"original_max_position_embeddings in {model.source}",),
            fixes=(run.set_fix(_CONTEXT, original), run.set_fix("runtime.engine", "transformers")),
            related=("model.model_name",),
            severity=Severity.ERROR if run.engine == "vllm" else Severity.WARNING,
        )
