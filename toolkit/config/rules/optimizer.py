"""Rules on the optimizer: its package, its arguments, and the modules that it is applied to."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from toolkit.base.did_you_mean import nearest
from toolkit.config.finding import Fix, Severity
from toolkit.config.rules.violation import RuleViolation, rule
from toolkit.config.trl_names import OPTIMIZERS, TARGETED_OPTIMIZERS, is_installed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toolkit.config.rules.run import Run

OPTIM, ARGS, TARGETS = "grpo.optim", "grpo.optim_args", "grpo.optim_target_modules"
ACCUMULATION_STEPS = "grpo.gradient_accumulation_steps"
_DEFAULT_OPTIMIZER = "adamw_torch_fused"
_NON_NUMERIC_OPTIONS = (
    "nesterov", "centered", "proj", "proj_type", "scale_type", "use_kahan_summation",
    "momentum_dtype", "variance_dtype", "compensation_buffer_dtype", "bf16_stochastic_round",
    "kahan_sum", "decouple_lr",
)  # fmt: skip
"""Options whose value is not a number."""


@rule(
    "GRPO035",
    f"{OPTIM} {TARGETS} {ACCUMULATION_STEPS}",
    example="grpo:\n  optim: galore_adamw",
    fix="set optim: adamw_torch_fused, or optim_target_modules: all-linear",
)
def optimizer_has_targets(run: Run) -> Iterator[RuleViolation]:
    """The optimizers GaLore and APOLLO need optim_target_modules. Their layerwise variants also
    need a single process and gradient_accumulation_steps: 1.

    GaLore and APOLLO project the gradients of the modules in the list optim_target_modules. The
    layerwise variants update weights inside the backward pass, so gradients cannot be summed over
    micro-batches or processes.
    """
    optim = run.value(OPTIM)
    if not str(optim).startswith(TARGETED_OPTIMIZERS):
        return
    if run.value(TARGETS) in (None, "", []):
        yield RuleViolation(
            OPTIM,
            f"{optim} needs optim_target_modules",
            notes=(run.describe(TARGETS),),
            fixes=(run.set_fix(OPTIM, _DEFAULT_OPTIMIZER), Fix("optim_target_modules: all-linear")),
            related=(TARGETS,),
        )
    elif (package := OPTIMIZERS[optim].package) and not is_installed(package):
        yield RuleViolation(
            OPTIM,
            f"{optim} needs {package.install}, which is not installed here",
            fixes=(Fix(f"pip install {package.install}"),),
            severity=Severity.WARNING,
            unknown=True,
        )
    if not optim.endswith("layerwise"):
        return
    if run.value(ACCUMULATION_STEPS) != 1:
        yield RuleViolation(
            ACCUMULATION_STEPS,
            f"{optim} updates weights inside the backward pass and cannot accumulate gradients",
            notes=(run.describe(ACCUMULATION_STEPS),),
            fixes=(run.set_fix(ACCUMULATION_STEPS, 1),),
            related=(OPTIM,),
        )
    if run.replicas > 1:
        yield RuleViolation(
            OPTIM,
            f"{optim} can train in only one process",
            notes=(f"world size {run.world_size}",),
            fixes=(run.set_fix(OPTIM, _DEFAULT_OPTIMIZER),),
        )


@rule(
    "GRPO036",
    f"{ARGS} {OPTIM}",
    example='grpo:\n  optim: sgd\n  optim_args: "momentun=0.9"',
    fix='optim_args: "momentum=0.9"',
)
def optimizer_knows_its_arguments(run: Run) -> Iterator[RuleViolation]:
    """optim_args contains name=value pairs, separated by commas. Each name must be an argument that
    the optimizer reads.

    transformers silently ignores pairs that the optimizer does not read. The learning rate and
    AdamW's betas, epsilon and weight decay have their own keys in grpo.
    """
    text, optim = run.value(ARGS), run.value(OPTIM)
    if not text or optim not in OPTIMIZERS:
        return
    options = OPTIMIZERS[optim].options
    pairs: dict[str, str] = {}
    for pair in str(text).replace(" ", "").split(","):
        name, equals, value = pair.partition("=")
        if not (name and equals and value) or "=" in value:
            yield RuleViolation(
                ARGS, f"{pair!r} is not a name=value pair", fixes=(_args_fix(run, pairs),)
            )
            return
        pairs[name] = value
    for name, value in pairs.items():
        if name not in options:
            yield _unread_argument(run, optim, options, pairs, name)
        elif name not in _NON_NUMERIC_OPTIONS and not _is_number(value):
            yield RuleViolation(
                ARGS, f"{name} must be a number of at least 0, got {value!r}", related=(OPTIM,)
            )
    nesterov = pairs.get("nesterov", "").lower() in ("true", "1", "yes")
    momentum = pairs.get("momentum", "0")
    if optim == "sgd" and nesterov and _is_number(momentum) and float(momentum) == 0:
        yield RuleViolation(
            ARGS,
            "nesterov needs a momentum above 0",
            fixes=(_args_fix(run, {**pairs, "momentum": "0.9"}),),
            related=(OPTIM,),
        )


def _unread_argument(
    run: Run, optim: str, options: tuple[str, ...], pairs: dict[str, str], name: str
) -> RuleViolation:
    suggestion = nearest(name, options)
    renamed = {
        suggestion if key == name and suggestion else key: value for key, value in pairs.items()
    }
    remaining = {key: value for key, value in pairs.items() if key != name}
    return RuleViolation(
        ARGS,
        f"the optimizer {optim} does not read {name} (it reads: {', '.join(options) or 'none'})",
        notes=(run.describe(OPTIM),),
        fixes=(_args_fix(run, renamed if suggestion else remaining),),
        related=(OPTIM,),
    )


def _args_fix(run: Run, pairs: dict[str, str]) -> Fix:
    return run.set_fix(ARGS, ",".join(f"{name}={value}" for name, value in pairs.items()) or None)


def _is_number(text: str) -> bool:
    """Whether ``text`` is a number of at least 0."""
    try:
        return 0 <= float(text) < math.inf
    except ValueError:
        return False


@rule(
    "GRPO039",
    f"{TARGETS} {OPTIM}",
    example="grpo:\n  optim_target_modules: all-linear",
    fix="remove optim_target_modules",
    severity=Severity.WARNING,
)
def targets_are_read(run: Run) -> Iterator[RuleViolation]:
    """optim_target_modules is only for the optimizers GaLore and APOLLO.

    No other optimizer reads the key.
    """
    if run.value(TARGETS) in (None, "", []) or str(run.value(OPTIM)).startswith(
        TARGETED_OPTIMIZERS
    ):
        return
    yield RuleViolation(
        TARGETS,
        "has no effect: only galore_* and apollo_* optimizers read this key",
        notes=(run.describe(OPTIM),),
        fixes=(run.set_fix(TARGETS, None),),
        related=(OPTIM,),
        on_key=True,
    )
