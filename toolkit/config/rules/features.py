"""Rules on settings that the model loader would refuse: load_in_* flags, attention functions,
number formats, and models that vLLM cannot run on a CPU. The conditions are in
``config.supported_features``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.config.finding import Fix, Severity
from toolkit.config.libraries import model_type, package_folder
from toolkit.config.resolved import resolve_dtype
from toolkit.config.rules.violation import RuleViolation, rule
from toolkit.config.supported_features import (
    UNSUPPORTED_FLAGS,
    attention_machine_problem,
    attention_problem,
    cpu_engine_problem,
    flag_problems,
    float16_problem,
    untied_head_problem,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toolkit.config.rules.run import Run
    from toolkit.config.supported_features import Problem

_ATTENTION = "model.attn_implementation"


def violation_for(
    run: Run, problem: Problem, *, note: str | None = None, severity: Severity | None = None
) -> RuleViolation:
    """The violation for a ``Problem`` (a setting that the model loader would refuse), with its
    fixes.
    """
    fixes = tuple(run.set_fix(key, value) for key, value in problem.fixes)
    if problem.hint is not None:
        fixes += (Fix(problem.hint),)
    return RuleViolation(
        problem.key,
        problem.message,
        notes=(note,) if note else (),
        fixes=fixes,
        related=("model.model_name",),
        severity=severity,
    )


@rule(
    "LOAD020", "model.load_in_fp8", example="model:\n  load_in_fp8: true", fix="load_in_4bit: true"
)
def fp8_is_not_trained(run: Run) -> Iterator[RuleViolation]:
    """load_in_fp8 is false.

    Training an adapter on 8-bit floating-point weights is not supported. load_in_4bit: true is
    supported and needs even less memory.
    """
    if run.value("model.load_in_fp8"):
        yield RuleViolation(
            "model.load_in_fp8",
            UNSUPPORTED_FLAGS["load_in_fp8"],
            fixes=(run.set_fix("model.load_in_fp8", False),),
        )


@rule(
    "LOAD021",
    "model.load_in_16bit model.dtype model.full_finetuning model.load_in_4bit model.load_in_8bit",
    example="model:\n  load_in_16bit: true\n  dtype: float32",
    fix="load_in_16bit: false",
)
def load_flags_are_compatible(run: Run) -> Iterator[RuleViolation]:
    """load_in_16bit excludes dtype float32, and full_finetuning excludes quantized weights.

    A weight is stored in either 16 or 32 bits. A weight that is quantized to 4 or 8 bits has no
    gradient, so full fine-tuning cannot train it.
    """
    names = ("load_in_4bit", "load_in_8bit", "load_in_16bit", "full_finetuning", "dtype")
    values = {name: run.get(f"model.{name}") for name in names}
    for problem in flag_problems(**values):
        if run.engine == "vllm" and values["full_finetuning"]:
            continue  # LOAD003 reports this fault
        involved = (problem.key, *(key for key, _ in problem.fixes))
        note = "; ".join(run.describe(key) for key in dict.fromkeys(involved))
        yield violation_for(run, problem, note=note)


@rule(
    "LOAD022",
    f"{_ATTENTION} model.dtype model.trust_remote_code",
    example="model:\n  attn_implementation: flashattn",
    fix="attn_implementation: flash_attention_2",
)
def attention_fits_model(run: Run) -> Iterator[RuleViolation]:
    """attn_implementation is an attention function of transformers that computes the model's
    attention correctly.

    Some models have no sdpa or flex attention, for instance gpt-oss because of its attention sinks.
    sdpa ignores the soft cap of Gemma 2. If the value contains a slash, the attention function is
    code from the hub and needs trust_remote_code. The model is checked if it is on this machine.
    """
    attention = run.value(_ATTENTION)
    config = run.model.text_config if run.model is not None else {}
    softcap, family = config.get("attn_logit_softcapping"), str(config.get("model_type") or "")
    problem = attention_problem(
        attention,
        softcap=softcap if isinstance(softcap, (int, float)) else None,
        supports=model_type(family).attention_support if family else {},
        trusted=bool(run.get("model.trust_remote_code")),
    )
    if problem is not None:
        yield violation_for(run, problem, note=run.model.source if run.model else None)


@rule(
    "LOAD023",
    f"{_ATTENTION} model.dtype",
    example="model:\n  attn_implementation: flash_attention_2  # with --gpu none",
    fix="attn_implementation: sdpa",
)
def attention_fits_machine(run: Run) -> Iterator[RuleViolation]:
    """flash_attention_N needs a GPU, a 16-bit dtype and an installed flash-attention package.
    flex_attention needs a GPU.

    torch has no backward pass of flex attention on a CPU. `envcheck validate` checks the GPU and
    the dtype if --gpu is given. `envcheck check` runs on the machine that trains, and also checks
    that the package is installed.
    """
    device = run.situation.device
    if device is None:
        return
    attention, is_training_machine = run.value(_ATTENTION), run.situation.vllm is not None
    precision_flags = {flag: run.get(f"grpo.{flag}") for flag in ("bf16", "fp16")}
    problem = attention_machine_problem(
        attention,
        on_gpu=device.compute_capability is not None,
        dtype=resolve_dtype(run.get("model.dtype"), run.situation, grpo=precision_flags),
        is_installed=not is_training_machine or package_folder("flash_attn") is not None,
    )
    if problem is not None:
        yield violation_for(run, problem, note=f"card: {device.name}")


@rule(
    "LOAD024",
    "grpo.fp16 model.dtype runtime.engine",
    example="grpo:\n  fp16: true  # with --gpu none",
    fix="fp16: false",
)
def float16_needs_a_card(run: Run) -> Iterator[RuleViolation]:
    """fp16 needs a GPU.

    Without a GPU there is no float16 mixed precision and no loss scaling. If model.dtype is not
    set, a vLLM engine without a GPU samples in float32. The finding is an error if a vLLM engine
    samples in another format than float16. Otherwise the finding is a warning: fp16 has no effect
    on a float32 model, and a float16 model is trained without loss scaling. `envcheck validate`
    checks the rule only with --gpu.
    """
    device = run.situation.device
    if device is None or device.compute_capability is not None or not run.value("grpo.fp16"):
        return
    dtype_setting = run.get("model.dtype")
    dtype = resolve_dtype(
        dtype_setting, run.situation, load_in_16bit=run.get("model.load_in_16bit")
    )
    conflicts_with_engine = run.engine == "vllm" and dtype != "float16"
    if (conflicts_with_engine and dtype_setting != "auto") or run.get("grpo.bf16"):
        return  # RUN020 and GRPO023 report this fault
    if conflicts_with_engine:
        message = f"float16 cannot be used: there is no GPU, and the engine samples in {dtype}"
    elif dtype == "float16":
        message = "there is no GPU, so the loss is not scaled: gradients below 6e-8 become 0"
    else:
        message = f"has no effect: there is no GPU, and the run computes in {dtype}"
    yield RuleViolation(
        "grpo.fp16",
        message,
        notes=(f"{run.describe('model.dtype')}; {run.describe('runtime.engine')}",),
        fixes=(run.set_fix("grpo.fp16", False),),
        related=("model.dtype",),
        severity=Severity.ERROR if conflicts_with_engine else Severity.WARNING,
    )


@rule(
    "LOAD025",
    "model.model_name runtime.engine",
    example="""
model: {model_name: ./tiny}  # heads of 16 values, with --gpu none
runtime: {engine: vllm}
""",
    fix="runtime.engine: transformers",
)
def cpu_engine_supports_model(run: Run) -> Iterator[RuleViolation]:
    """Without a GPU, vLLM must have CPU kernels for the model's attention head size and for its
    experts.

    `envcheck validate` checks the rule with --gpu none if the model is on this machine.
    """
    device = run.situation.device
    if device is None or device.compute_capability is not None or run.model is None:
        return
    problem = cpu_engine_problem(run.model.config) if run.engine == "vllm" else None
    if problem is not None:
        yield violation_for(run, problem, note=f"{run.model.source}, on a CPU")


@rule(
    "LOAD026",
    "model.dtype model.model_name runtime.engine",
    example="model:\n  model_name: google/gemma-2-2b-it\n  dtype: float16\nruntime: {engine: vllm}",
    fix="dtype: bfloat16",
)
def engine_supports_dtype(run: Run) -> Iterator[RuleViolation]:
    """With the vLLM engine, dtype float16 needs a model that vLLM runs in float16.

    Gemma 2 and 3 and GLM-4 overflow in float16. The rule is checked if the model is on this
    machine.
    """
    if run.model is None or run.engine != "vllm":
        return
    precision_flags = {flag: run.get(f"grpo.{flag}") for flag in ("bf16", "fp16")}
    dtype = resolve_dtype(run.get("model.dtype"), run.situation, grpo=precision_flags)
    problem = float16_problem(run.model.config, dtype)
    if problem is not None:
        yield violation_for(run, problem, note=run.model.source)


@rule(
    "LOAD028",
    "model.model_name runtime.engine",
    example="""
model: {model_name: ./untied}  # Gemma 2 with tie_word_embeddings: false
runtime: {engine: vllm}
""",
    fix="runtime.engine: transformers",
)
def engine_supports_lm_head(run: Run) -> Iterator[RuleViolation]:
    """With the vLLM engine, a Gemma 2 model must use its embedding as the head.

    vLLM does not support a Gemma 2 model with a separate head. The published Gemma 2 models use the
    embedding. The rule is checked if the model is on this machine.
    """
    if run.model is None or run.engine != "vllm":
        return
    problem = untied_head_problem(run.model.config)
    if problem is not None:
        yield violation_for(run, problem, note=run.model.source)
