"""Rules on the layers and modules that get the adapter. These modules must exist, their type must
allow an adapter, and the engine must have LoRA slots for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.base.did_you_mean import nearest
from toolkit.config.finding import Fix, Severity
from toolkit.config.lora_targets import SLOT_LAYERS, layers_beyond
from toolkit.config.rules.violation import RuleViolation, rule
from toolkit.config.supported_features import DATA_INITS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toolkit.config.rules.run import Run

_LAYERS = "lora.layers_to_transform"
_PATTERN = "lora.layers_pattern"
_TARGETS = "lora.target_modules"
_INIT = "lora.init_lora_weights"


@rule(
    "LORA020",
    _LAYERS,
    example="lora:\n  layers_to_transform: [0, 99]",
    fix="layers_to_transform: [0, 1]",
)
def layers_exist(run: Run) -> Iterator[RuleViolation]:
    """The layer numbers in layers_to_transform exist in the model.

    Layers are counted from 0. PEFT silently skips a layer that does not exist, so the adapter would
    have fewer layers than the run file sets. The rule is checked if the model is on this machine.
    """
    layers = run.value(_LAYERS)
    layer_count = (
        run.model.positive_integer("num_hidden_layers", "n_layer")
        if run.model is not None
        else None
    )
    missing_layers = layers_beyond(layers, layer_count)
    if not missing_layers:
        return
    assert layer_count is not None
    assert run.model is not None
    layer_list = [layers] if isinstance(layers, int) else list(layers)
    existing_layers = [layer for layer in layer_list if layer not in missing_layers]
    yield RuleViolation(
        _LAYERS,
        f"the model has no layer {', '.join(map(str, missing_layers))}: it has {layer_count} "
        f"layers (0 to {layer_count - 1})",
        notes=(f"num_hidden_layers in {run.model.source}",),
        fixes=(Fix(f"layers_to_transform: {existing_layers}"),)
        if existing_layers
        else (run.set_fix(_LAYERS, None),),
    )


@rule(
    "LORA021",
    _INIT,
    example="runtime: {engine: transformers}\nlora:\n  init_lora_weights: corda",
    fix="init_lora_weights: true",
)
def init_needs_no_data(run: Run) -> Iterator[RuleViolation]:
    """init_lora_weights is a method that a run file can configure completely.

    CorDA, EVA and LoRA-GA need data before the adapter is created. LoftQ needs a loftq_config. A
    run file cannot provide such data or a loftq_config. Without these inputs PEFT refuses the
    method or starts from random values.
    """
    init = run.value(_INIT)
    reason = DATA_INITS.get(init) if isinstance(init, str) else None
    if reason is None or run.engine != "transformers":
        return  # with the engine, LORA004 reports the method
    if init == "loftq" and (run.get("model.load_in_4bit") or run.get("model.load_in_8bit")):
        return  # LORA005 reports this fault
    yield RuleViolation(
        _INIT, f"{init} cannot be used: {reason}", fixes=(run.set_fix(_INIT, True),)
    )


@rule(
    "LORA022",
    _TARGETS,
    example="runtime: {engine: vllm}\nlora:\n  target_modules: [q_proj, fc1]",
    fix="target_modules: [q_proj, k_proj, v_proj, o_proj]",
)
def targets_have_slots(run: Run) -> Iterator[RuleViolation]:
    """With the vLLM engine, target_modules contains only layers for which the engine has LoRA
    slots.

    A slot is memory in which the engine keeps an adapter. The engine has slots for the projections
    of attention and MLP. Slots for all linear layers would cost memory, and time for every token.
    LORA004 reports adapters on embeddings and lm_head. LORA013 reports adapters on experts.
    """
    targets = run.value(_TARGETS)
    if run.engine == "transformers" or isinstance(targets, str):
        return
    if run.get("model.full_finetuning"):
        return
    is_in_file = run.is_set(_TARGETS)
    for index, name in enumerate(targets):
        leaf = str(name).rpartition(".")[2]
        if leaf in (*SLOT_LAYERS, "embed_tokens", "lm_head", "kv_b_proj") or not _is_module(
            run, leaf
        ):
            continue
        yield RuleViolation(
            ("lora", "target_modules", index) if is_in_file else "lora.adapter_path",
            f"the vLLM engine has no LoRA slots for {leaf}",
            notes=(f"it has slots for {', '.join(SLOT_LAYERS)}; {run.describe('runtime.engine')}",),
            fixes=(
                *((Fix(f"remove {name}"),) if is_in_file else ()),
                run.set_fix("runtime.engine", "transformers"),
            ),
            severity=Severity.ERROR if run.engine == "vllm" else Severity.WARNING,
        )


def _is_module(run: Run, leaf: str) -> bool:
    """Whether ``leaf`` is the name of a module of the model. If the names of the modules are not
    known, the result is True. For a normalization layer the result is always False, so that only
    the rule LORA028 reports this layer.
    """
    modules = run.model.weight_modules if run.model is not None else None
    if leaf.lower().endswith("norm"):
        return False  # LORA028 reports this fault
    return not modules or any(module.rpartition(".")[2] == leaf for module in modules)


@rule(
    "LORA023",
    f"{_PATTERN} {_LAYERS}",
    example="lora:\n  layers_to_transform: [0]\n  layers_pattern: blocks",
    fix="layers_pattern: layers",
)
def pattern_names_the_layers(run: Run) -> Iterator[RuleViolation]:
    """layers_pattern is the name of the module list that holds the model's layers.

    In a module name, this list is the part before the layer number, such as layers in
    model.layers.0.mlp. The rule is checked if the model's weights are on this machine.
    """
    pattern = run.value(_PATTERN)
    modules = run.model.weight_modules if run.model is not None else None
    if pattern is None or not modules or run.value(_LAYERS) is None:
        return
    lists = {
        parts[position - 1]
        for parts in (module.split(".") for module in modules)
        for position in range(1, len(parts))
        if parts[position].isdigit()
    }
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    if not any(name in lists for name in patterns):
        yield RuleViolation(
            _PATTERN,
            f"the model has no list of layers named {' or '.join(patterns)}",
            notes=(f"its lists of layers: {', '.join(sorted(lists))}",),
            fixes=(run.set_fix(_PATTERN, min(lists)),) if len(lists) == 1 else (),
        )


@rule(
    "LORA027",
    "lora.modules_to_save",
    example="runtime: {engine: transformers}\nlora:\n  modules_to_save: [lm_hed]",
    fix="modules_to_save: [lm_head]",
)
def saved_modules_exist(run: Run) -> Iterator[RuleViolation]:
    """The modules in modules_to_save exist and have no adapter.

    modules_to_save is the list of modules that are fully trained. PEFT silently skips a name that
    is not in the model, so nothing would be trained for this name. A module that is fully trained
    cannot also have an adapter. The rule is checked if the model's weights are on this machine.
    """
    saved_modules = run.value("lora.modules_to_save")
    modules = run.model.weight_modules if run.model is not None else None
    if not saved_modules or not modules:
        return
    targets = run.value(_TARGETS)
    adapted = () if isinstance(targets, str) else targets
    for index, name in enumerate(saved_modules):
        path = ("lora", "modules_to_save", index)
        dotted_name = f".{name}."
        if not any(dotted_name in f".{module}." for module in modules):
            leaf_names = sorted({module.rpartition(".")[2] for module in modules})
            suggestion = nearest(name, leaf_names)
            yield RuleViolation(
                path,
                f"the model has no module {name}",
                notes=(f"its modules: {', '.join(leaf_names[:14])}",),
                fixes=(Fix(f"write {suggestion}"),) if suggestion else (),
            )
        elif name in adapted:
            yield RuleViolation(
                path,
                f"{name} would be fully trained and also get an adapter from target_modules",
                notes=(run.describe(_TARGETS),),
                fixes=(Fix(f"remove {name} from modules_to_save or from target_modules"),),
            )


@rule(
    "LORA028",
    _TARGETS,
    example="lora:\n  target_modules: [q_proj, input_layernorm]",
    fix="target_modules: [q_proj]",
)
def no_norm_layer_targets(run: Run) -> Iterator[RuleViolation]:
    """target_modules contains no normalization layer.

    An adapter is a product of two matrices that is added to a weight matrix. The weight of a
    normalization layer is a vector. PEFT refuses such a target, but only after the model has
    loaded.
    """
    targets = run.value(_TARGETS)
    if isinstance(targets, str):
        return
    for index, name in enumerate(targets):
        if str(name).lower().endswith("norm") and run.is_set(_TARGETS):
            yield RuleViolation(
                ("lora", "target_modules", index),
                f"{name} cannot have an adapter: it is a normalization layer, and its weight is a "
                "vector",
                fixes=(Fix(f"remove {name}"),),
            )
