"""Rules on the loss, the reference model, the warm-up and the learning rate, as TRL's trainer
requires.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.config.finding import Fix, Severity
from toolkit.config.rules.violation import RuleViolation, rule
from toolkit.config.trl_names import LIGER_PACKAGE, is_installed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toolkit.config.rules.run import Run

_LIGER = "grpo.use_liger_kernel"
_TARGETS = "lora.target_modules"
REMOVE_HEAD_FIX = Fix("remove lm_head from target_modules")
MIN_PLAUSIBLE_RATE, MAX_PLAUSIBLE_RATE = 1e-7, 1.0


def adapts_head(run: Run) -> bool:
    """Whether the run file puts an adapter on lm_head."""
    return not run.get("model.full_finetuning") and "lm_head" in run.get(_TARGETS)


@rule(
    "GRPO010",
    "grpo.log_completions_hub_repo grpo.log_completions",
    example="grpo:\n  log_completions_hub_repo: me/completions",
    fix="log_completions: true",
)
def repo_needs_logging(run: Run) -> Iterator[RuleViolation]:
    """log_completions_hub_repo needs log_completions.

    Completions are uploaded to the repository only if they are logged.
    """
    repo = run.value("grpo.log_completions_hub_repo")
    if repo is not None and not run.value("grpo.log_completions"):
        yield RuleViolation(
            "grpo.log_completions_hub_repo",
            "no completions are uploaded while log_completions is false",
            notes=(run.describe("grpo.log_completions"),),
            fixes=(run.set_fix("grpo.log_completions", True),),
            related=("grpo.log_completions",),
        )


@rule(
    "GRPO013",
    f"{_LIGER} grpo.liger_kernel_config grpo.off_policy_mask_threshold grpo.top_entropy_quantile "
    "grpo.entropy_coef grpo.use_adaptive_entropy",
    example="grpo:\n  use_liger_kernel: true\n  entropy_coef: 0.01",
    fix="use_liger_kernel: false",
)
def liger_has_no_clashes(run: Run) -> Iterator[RuleViolation]:
    """use_liger_kernel needs the package liger-kernel, and excludes entropy terms, off-policy
    masking and an adapter on lm_head.

    Liger's fused loss never creates the logits. An entropy bonus, top_entropy_quantile below 1 and
    off_policy_mask_threshold are computed from the logits, so they cannot be combined with this
    loss. The fused loss also cannot use an adapter on lm_head. TRL deprecates use_liger_kernel,
    because TRL's own loss now processes the tokens in chunks.
    """
    if not run.get(_LIGER):
        return
    clashes = [
        key
        for key, clash in (
            ("grpo.off_policy_mask_threshold", lambda value: value is not None),
            ("grpo.top_entropy_quantile", lambda value: value < 1),
            ("grpo.entropy_coef", lambda value: value != 0),
            ("grpo.use_adaptive_entropy", lambda value: value is True),
            (
                "grpo.liger_kernel_config",
                lambda value: bool(value and value.get("fused_linear_cross_entropy")),
            ),
        )
        if clash(_plain_value(run, key))
    ]
    if adapts_head(run):
        clashes.append(_TARGETS)
    if clashes:
        names = [
            "an adapter on lm_head" if key == _TARGETS else key.rpartition(".")[2]
            for key in clashes
        ]
        yield RuleViolation(
            _LIGER,
            f"Liger cannot be used with {', '.join(names)}",
            notes=("; ".join(run.describe(key) for key in clashes),),
            fixes=(REMOVE_HEAD_FIX if clashes == [_TARGETS] else run.set_fix(_LIGER, False),),
            related=tuple(clashes),
        )
    # GRPO066 reports use_liger_kernel together with fused_kernels: true
    elif not is_installed(LIGER_PACKAGE) and run.get("runtime.fused_kernels") is not True:
        yield RuleViolation(
            _LIGER,
            f"Liger's loss needs the package {LIGER_PACKAGE.install}, which is not installed here",
            fixes=(Fix(f"pip install {LIGER_PACKAGE.install}"),),
            severity=Severity.WARNING,
            unknown=True,
        )


def _plain_value(run: Run, key: str) -> object:
    value, node = run.get(key), run.node(key)
    return node.to_plain() if node is not None else value


@rule(
    "GRPO014",
    f"grpo.cast_lm_head_to_fp32 {_TARGETS} model.model_name",
    example="grpo:\n  cast_lm_head_to_fp32: true\nlora:\n  target_modules: [q_proj, lm_head]",
    fix="remove lm_head from target_modules",
)
def cast_head_without_adapter(run: Run) -> Iterator[RuleViolation]:
    """With cast_lm_head_to_fp32, lm_head has no adapter and does not share its weight with the
    embedding.

    The cast replaces lm_head by a float32 copy, so an adapter on lm_head would be lost. If lm_head
    is tied to the embedding, TRL 1.16 looks for the embedding under a name that a model with an
    adapter does not have. Tied weights are checked when the model is on this machine.
    """
    if not run.value("grpo.cast_lm_head_to_fp32"):
        return
    if run.model is not None and run.model.has_tied_head and not run.get("model.full_finetuning"):
        yield RuleViolation(
            "grpo.cast_lm_head_to_fp32",
            "with an adapter, TRL cannot cast an lm_head to float32 if it is tied to the embedding",
            notes=(f"tie_word_embeddings in {run.model.source}",),
            fixes=(run.set_fix("grpo.cast_lm_head_to_fp32", False),),
        )
    elif adapts_head(run):
        yield RuleViolation(
            "grpo.cast_lm_head_to_fp32",
            "lm_head cannot be cast to float32 while it has an adapter",
            notes=(run.describe(_TARGETS),),
            fixes=(REMOVE_HEAD_FIX,),
            related=(_TARGETS,),
        )


@rule(
    "GRPO015",
    "grpo.sync_ref_model grpo.beta model.full_finetuning",
    example="grpo:\n  sync_ref_model: true",
    fix="sync_ref_model: false",
)
def sync_needs_reference(run: Run) -> Iterator[RuleViolation]:
    """sync_ref_model needs beta above 0 and full fine-tuning.

    With beta 0 there is no reference model. With LoRA the reference is a frozen copy of the adapter
    that the run starts from, on the same base weights. So there is no second model to synchronize.
    """
    if not run.value("grpo.sync_ref_model"):
        return
    is_full_finetuning, beta = run.value("model.full_finetuning"), run.value("grpo.beta")
    if is_full_finetuning and beta > 0:
        return
    reason = (
        "beta is 0: there is no reference model"
        if is_full_finetuning
        else "LoRA has no second model"
    )
    yield RuleViolation(
        "grpo.sync_ref_model",
        f"{reason} to synchronize",
        notes=(f"{run.describe('grpo.beta')}; {run.describe('model.full_finetuning')}",),
        fixes=(run.set_fix("grpo.sync_ref_model", False),),
        related=("grpo.beta",),
    )


@rule(
    "GRPO019",
    "grpo.warmup_steps",
    example="grpo:\n  warmup_steps: 10\n  warmup_ratio: 0.1",
    fix="warmup_steps: 0.1",
)
def one_warmup(run: Run) -> Iterator[RuleViolation]:
    """warmup_steps and warmup_ratio are mutually exclusive.

    transformers 5 has only warmup_steps. A value of 1 or more is a number of steps. A value below 1
    is a fraction of the run, as warmup_ratio was.
    """
    ratio = run.node("grpo.warmup_ratio")
    if ratio is not None and run.is_set("grpo.warmup_steps"):
        yield RuleViolation(
            "grpo.warmup_ratio",
            "cannot be set together with warmup_steps",
            notes=(run.describe("grpo.warmup_steps"),),
            related=("grpo.warmup_steps",),
            on_key=True,
        )


@rule(
    "GRPO020",
    "grpo.learning_rate",
    example="grpo:\n  learning_rate: 5.0",
    fix="learning_rate: 1.0e-6",
    severity=Severity.WARNING,
)
def plausible_learning_rate(run: Run) -> Iterator[RuleViolation]:
    """learning_rate is between 1e-7 and 1.

    With a rate below 1e-7 an adapter hardly changes in thousands of steps. With a rate above 1,
    training diverges. The usual cause is a mistyped exponent. Usual values for GRPO with LoRA are
    1e-6 to 5e-5.
    """
    rate = run.value("grpo.learning_rate")
    if not MIN_PLAUSIBLE_RATE <= rate <= MAX_PLAUSIBLE_RATE:
        comparison = "below 1e-7" if rate < MIN_PLAUSIBLE_RATE else "above 1"
        yield RuleViolation(
            "grpo.learning_rate",
            f"the rate {rate} is {comparison}, probably because the exponent is wrong",
            fixes=(run.set_fix("grpo.learning_rate", 1e-6),),
        )
