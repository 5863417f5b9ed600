"""Rules on the adapter's settings per layer (ranks, alphas, excluded modules), and on the adapter
that training starts from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.config.adapter_facts import INHERITED, read_adapter, start_problem
from toolkit.config.finding import Fix, Severity
from toolkit.config.lora_targets import is_excluded, pattern_fault, pattern_value
from toolkit.config.message_text import show_value
from toolkit.config.rules.violation import RuleViolation, rule
from toolkit.config.run_paths import path_exists, resolve_path

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from toolkit.config.rules.run import Run

_PATH = "lora.adapter_path"
_EXCLUDE = "lora.exclude_modules"
WEIGHTS_FILE = "adapter_model.safetensors"
_START_KEYS = " ".join((_PATH, *(f"lora.{name}" for name in INHERITED)))


@rule(
    "LORA024",
    _START_KEYS,
    example="lora:\n  adapter_path: runs/first/adapter  # of rank 8\n  r: 16",
    fix="remove r, or set r: 8",
)
def adapter_matches_lora_keys(run: Run) -> Iterator[RuleViolation]:
    """adapter_path is the folder of a LoRA adapter, and the other lora keys that are set match this
    adapter.

    Keys of the lora section that are not set have the adapter's values. A key with a different
    value would not fit the adapter's tensors. When model and adapter are loaded, the run checks
    that the adapter was trained on this model.
    """
    node = run.node(_PATH)
    if node is None or run.value(_PATH) is None:
        return
    folder = resolve_path(node.value, node)
    adapter_config = read_adapter(folder)
    if adapter_config is None or not path_exists(folder / WEIGHTS_FILE):
        missing_file = "adapter_config.json" if adapter_config is None else WEIGHTS_FILE
        problem = f"has no readable {missing_file}" if path_exists(folder) else "does not exist"
        yield RuleViolation(
            _PATH, f"{folder} {problem}: adapter_path must be the folder of an adapter"
        )
        return
    if adapter_config.get("peft_type") != "LORA":
        yield RuleViolation(
            _PATH,
            f"the adapter has peft_type {adapter_config.get('peft_type')}, but only LORA is "
            "supported",
        )
        return
    init = "lora.init_lora_weights"
    if run.value(init) is not True:
        yield RuleViolation(
            init,
            "has no effect: the adapter at adapter_path contains the initial weights",
            notes=(run.describe(_PATH),),
            severity=Severity.WARNING,
        )
    for name in INHERITED:
        key, adapter_value = f"lora.{name}", run.adapter_settings.get(name)
        if not run.is_set(key):
            continue
        if name in ("rank_pattern", "alpha_pattern"):
            run_value, adapter_value = run.mapping(key), adapter_value or {}
        else:
            run_value = run.value(key)
        if _comparable(run_value, name) != _comparable(adapter_value, name):
            yield RuleViolation(
                key,
                f"the run file sets {show_value(run_value)}, but the adapter that the run starts "
                f"from has {show_value(adapter_value)}",
                notes=(run.describe(_PATH),),
                fixes=(Fix(f"remove {name}, so that the adapter's value is used"),),
                related=(_PATH,),
            )


@rule(
    "LORA040",
    _PATH,
    example="lora:\n  adapter_path: runs/pissa/adapter  # init_lora_weights: pissa",
    fix="use an adapter that was trained with init_lora_weights: true",
)
def adapter_fits_base_model(run: Run) -> Iterator[RuleViolation]:
    """The adapter at adapter_path was trained on the unchanged weights of the checkpoint, and the
    keys of the lora section can describe this adapter.

    PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA rewrite the base weights before training, so the tensors
    of such an adapter are wrong for the weights of the checkpoint. The lora section has no keys for
    target_parameters and some other fields of PEFT. The memory of an adapter with such fields would
    be computed incorrectly.
    """
    node = run.node(_PATH)
    adapter_config = (
        None if node is None or not node.value else read_adapter(resolve_path(node.value, node))
    )
    if adapter_config is None or adapter_config.get("peft_type") != "LORA":
        return  # LORA024 reports this fault
    problem = start_problem(adapter_config)
    if problem is not None:
        yield RuleViolation(_PATH, problem.message, fixes=(Fix(str(problem.hint)),))


def _comparable(value: object, name: str) -> Any:
    """The value in a form that can be compared. A list is sorted, an integer becomes a float, and a
    missing value becomes PEFT's default for the key ``name``.
    """
    if isinstance(value, (list, tuple)):
        return sorted(map(str, value))
    if value is None or value == "auto":
        return {"lora_dropout": 0.0, "bias": "none", "use_rslora": False, "use_dora": False}.get(
            name
        )
    return float(value) if type(value) is int else value


@rule(
    "LORA025",
    "lora.rank_pattern lora.alpha_pattern",
    example="lora:\n  rank_pattern: {qproj: 8}",
    fix="rank_pattern: {q_proj: 8}",
)
def patterns_match_adapted_modules(run: Run) -> Iterator[RuleViolation]:
    """Each key of rank_pattern and alpha_pattern matches a module that has an adapter.

    A key is a regular expression for a module name or the end of a module name. A key that matches
    no module would have no effect. The keys are compared with the module names in the model's
    weights if the weights are on this machine.
    """
    modules = _adapted_modules(run)
    for name in ("rank_pattern", "alpha_pattern"):
        for key in run.mapping(f"lora.{name}"):
            problem = pattern_fault(key)
            if problem:
                yield RuleViolation(("lora", name, key), f"{key}: {problem}", on_key=True)
            elif modules and not any(
                pattern_value({key: True}, module, False) for module in modules
            ):
                yield RuleViolation(
                    ("lora", name, key),
                    f"{key} does not match any module that has an adapter",
                    notes=(run.describe("lora.target_modules"),),
                    on_key=True,
                )


@rule(
    "LORA026",
    f"{_EXCLUDE} lora.target_modules",
    example="lora:\n  target_modules: [q_proj]\n  exclude_modules: [q_proj]",
    fix="exclude_modules: [layers.0.self_attn.q_proj]",
)
def exclusion_leaves_modules(run: Run) -> Iterator[RuleViolation]:
    """exclude_modules excludes at least one of the target modules, but not all of them.

    A list item matches the end of a module name. A string is one regular expression for whole
    module names. exclude_modules is compared with the module names in the model's weights if the
    weights are on this machine.
    """
    exclude = run.value(_EXCLUDE)
    if exclude is None:
        return
    problem = pattern_fault(exclude) if isinstance(exclude, str) else None
    if problem:
        yield RuleViolation(_EXCLUDE, problem)
        return
    modules = _adapted_modules(run, apply_exclude=False)
    if not modules:
        return
    remaining = [name for name in modules if not is_excluded(exclude, name)]
    if not remaining:
        yield RuleViolation(
            _EXCLUDE,
            f"excludes all {len(modules)} modules that target_modules names",
            notes=(run.describe("lora.target_modules"),),
            fixes=(run.set_fix(_EXCLUDE, None),),
        )
    elif len(remaining) == len(modules):
        yield RuleViolation(
            _EXCLUDE,
            "excludes none of the modules that target_modules names",
            notes=(run.describe("lora.target_modules"),),
            severity=Severity.WARNING,
        )


def _adapted_modules(run: Run, *, apply_exclude: bool = True) -> list[str]:
    """The names of the modules that get the adapter. The result is [] if the weights are not on
    this machine or target_modules is a string. If ``apply_exclude`` is false, the modules of
    exclude_modules are in the result too.
    """
    targets, exclude = run.value("lora.target_modules"), run.get(_EXCLUDE)
    modules = run.model.weight_modules if run.model is not None else None
    if not modules:
        return []
    assert run.model is not None
    if targets == "auto":
        from toolkit.config.lora_targets import default_targets  # noqa: PLC0415 - only needed if the model is here

        targets = default_targets(run.model.config)
    if isinstance(targets, str):
        return []
    exclude_names = exclude if apply_exclude and not isinstance(exclude, str) else None
    return [
        name
        for name in _modules_ending_with(modules, targets)
        if not is_excluded(exclude_names, name)
    ]


def _modules_ending_with(modules: Iterable[str], targets: Iterable[str]) -> list[str]:
    suffixes = tuple(targets)
    return [
        module
        for module in modules
        if any(module == suffix or module.endswith(f".{suffix}") for suffix in suffixes)
    ]
