"""Rules on the adapter, as PEFT requires. The rules apply with every engine."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from toolkit.base.did_you_mean import nearest
from toolkit.config.finding import Severity
from toolkit.config.libraries import allowed_values
from toolkit.config.lora_targets import pattern_fault
from toolkit.config.rules.violation import RuleViolation, rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toolkit.config.rules.run import Run

_RANK = "lora.r"
_TARGETS = "lora.target_modules"
_INIT = "lora.init_lora_weights"


@rule("LORA001", _RANK, example="lora:\n  r: 0", fix="r: 16")
def positive_rank(run: Run) -> Iterator[RuleViolation]:
    """lora.r is an integer above 0.

    The adapter of a layer is the product of two matrices, B times A. B has r columns and A has r
    rows.
    """
    node = run.node(_RANK)
    if node is not None and type(node.value) is int and node.value <= 0:
        yield RuleViolation(
            _RANK,
            f"{node.value} is not a valid rank: it must be above 0",
            fixes=(run.set_fix(_RANK, 16),),
        )


@rule(
    "LORA005",
    f"{_INIT} model.load_in_4bit model.load_in_8bit",
    example="""
model:
  load_in_4bit: true
runtime: {engine: transformers}
lora:
  init_lora_weights: loftq
""",
    fix="init_lora_weights: true",
)
def loftq_needs_unquantized_weights(run: Run) -> Iterator[RuleViolation]:
    """init_lora_weights: loftq needs base weights that are not quantized.

    LoftQ quantizes the base weights itself and initializes the adapter with the quantization error.
    LoftQ needs the original weights, which a quantized model no longer has.
    """
    if run.value(_INIT) != "loftq":
        return
    reason = next(
        (
            run.describe(key)
            for key in ("model.load_in_4bit", "model.load_in_8bit")
            if run.value(key)
        ),
        None,
    )
    if reason:
        yield RuleViolation(
            _INIT,
            "loftq quantizes the base weights itself, but the base weights are already quantized",
            notes=(reason,),
            fixes=(run.set_fix(_INIT, True),),
            related=("model.load_in_4bit", "model.load_in_8bit"),
        )


@rule(
    "LORA006",
    _INIT,
    example="lora:\n  init_lora_weights: guassian",
    fix="init_lora_weights: gaussian",
)
def init_is_known(run: Run) -> Iterator[RuleViolation]:
    """init_lora_weights is a value that PEFT accepts.

    The values are true (the adapter matrix B starts at 0), false (B starts at random values), and
    the names of methods, which are read from the installed PEFT. In the name pissa_niter_N, N is
    the number of iterations (at most 999).
    """
    value = run.value(_INIT)
    if isinstance(value, bool):
        return
    supported = allowed_values("lora_inits")
    names = [name for name in supported.values if "[" not in name]
    if value in names or re.fullmatch(r"pissa_niter_[0-9]{1,3}", value):
        return
    suggestion = nearest(value, names)
    yield RuleViolation(
        _INIT,
        f"{value} is not an initialization that {supported.origin} supports",
        notes=(f"legal values: true, false, {', '.join(names)}, pissa_niter_16",),
        fixes=(run.set_fix(_INIT, suggestion or True),),
    )


@rule(
    "LORA007",
    _TARGETS,
    example="lora:\n  target_modules: 'model.layers.(0|1'",
    fix="target_modules: [q_proj, k_proj, v_proj, o_proj]",
)
def targets_exist(run: Run) -> Iterator[RuleViolation]:
    """target_modules is a list of modules of the model, or a regular expression that matches
    modules of the model.

    A list item matches the end of a module name. A string is one regular expression for whole
    module names, or "all-linear". The value "auto" chooses the model's projections. If the model's
    weights are on this machine, target_modules is compared with the module names in the weights.
    """
    targets = run.value(_TARGETS)
    if targets == "auto":
        return
    if isinstance(targets, str):
        yield from _pattern_violations(run, targets)
        return
    modules = run.model.weight_modules if run.model is not None else None
    if not modules or not run.is_set(_TARGETS):
        return
    node = run.node(_TARGETS)
    assert node is not None
    for index, name in enumerate(targets):
        if not any(module == name or module.endswith(f".{name}") for module in modules):
            leaf_names = sorted({module.rpartition(".")[2] for module in modules})
            suggestion = nearest(name, leaf_names)
            yield RuleViolation(
                ("lora", "target_modules", index),
                f"the model has no module {name}",
                notes=(f"its modules: {', '.join(leaf_names[:14])}",),
                fixes=(run.replace_fix(node.value[index], suggestion),) if suggestion else (),
            )


def _pattern_violations(run: Run, text: str) -> Iterator[RuleViolation]:
    if text == "all-linear":
        return
    problem = pattern_fault(text)
    if problem is not None and problem.startswith("not a"):
        yield RuleViolation(_TARGETS, problem)
        return
    modules = run.model.weight_modules if run.model is not None else None
    if problem is not None or not modules:
        return  # expressions that could take very long are not tried here
    parents = {module.rpartition(".")[0] for module in modules}
    norms = {module for module in modules if module.lower().endswith("norm")}
    has_exclusions = run.get("lora.exclude_modules") is not None
    for module in () if has_exclusions else sorted(norms | parents - modules - {""}):
        if re.fullmatch(text, module):
            yield RuleViolation(
                _TARGETS,
                f"the expression matches {module}, which PEFT would refuse because it is not a "
                "linear layer",
                notes=("the expression must match whole names, for instance .*\\.q_proj",),
            )
            return
    if not any(re.fullmatch(text, module) for module in modules):
        yield RuleViolation(
            _TARGETS,
            "no module of the model matches this regular expression",
            notes=("the expression must match whole names, for instance .*\\.q_proj",),
        )


@rule(
    "LORA008",
    f"lora.layers_pattern lora.layers_to_transform {_TARGETS}",
    example="lora:\n  layers_pattern: layers",
    fix="layers_to_transform: [0, 1]",
)
def layer_keys_are_compatible(run: Run) -> Iterator[RuleViolation]:
    """layers_pattern needs layers_to_transform. Neither key can be used if target_modules is a
    string.

    A string is a regular expression for whole module names, so it chooses the layers itself.
    """
    pattern, layers = run.value("lora.layers_pattern"), run.value("lora.layers_to_transform")
    if isinstance(run.value(_TARGETS), str) and run.value(_TARGETS) != "auto":
        for key, value in (("layers_to_transform", layers), ("layers_pattern", pattern)):
            if value is not None:
                yield RuleViolation(
                    f"lora.{key}",
                    "cannot be used when target_modules is a string, which chooses the layers "
                    "itself",
                    notes=(run.describe(_TARGETS),),
                    fixes=(run.set_fix(f"lora.{key}", None),),
                    related=(_TARGETS,),
                )
    elif pattern is not None and layers is None:
        yield RuleViolation(
            "lora.layers_pattern",
            "needs layers_to_transform",
            notes=(run.describe("lora.layers_to_transform"),),
            fixes=(run.set_fix("lora.layers_pattern", None),),
        )


@rule(
    "LORA010",
    "lora.lora_dropout",
    example="lora:\n  lora_dropout: 0.05",
    fix="lora_dropout: 0.0",
    severity=Severity.WARNING,
)
def no_dropout(run: Run) -> Iterator[RuleViolation]:
    """lora_dropout is 0.

    With dropout the trainer's log-probabilities differ from those of the policy that the engine
    sampled from. The trainer must then compute the log-probabilities of the sampled tokens once
    more, so each step is slower.
    """
    dropout = run.value("lora.lora_dropout")
    if dropout:
        yield RuleViolation(
            "lora.lora_dropout",
            f"a dropout of {dropout} makes steps slower, and makes the trainer's log-probabilities "
            "differ from the engine's",
            fixes=(run.set_fix("lora.lora_dropout", 0.0),),
        )
