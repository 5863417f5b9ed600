"""Rules on the model's files: whether the toolkit and the run's engine support the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.base.vllm_models import vllm_supports_any
from toolkit.config.finding import Fix, Severity
from toolkit.config.libraries import model_type
from toolkit.config.model_facts import ADAPTER_CONFIG, is_adapter, read_json
from toolkit.config.rules.features import violation_for
from toolkit.config.rules.violation import RuleViolation, rule
from toolkit.config.run_paths import path_exists, resolve_path
from toolkit.config.supported_features import architecture_problem, storage_format, storage_problem

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from toolkit.config.rules.run import Run

_NAME = "model.model_name"


def _model_folder(run: Run) -> Path | None:
    """The folder at the path model_name; None if there is no such folder."""
    node = run.node(_NAME)
    if node is None or not isinstance(node.value, str):
        return None
    folder = resolve_path(node.value, node)
    return folder if path_exists(folder) and folder.is_dir() else None


@rule(
    "MODEL002",
    f"{_NAME} model.revision",
    example="model:\n  model_name: ./my-model  # a folder\n  revision: main",
    fix="remove revision",
)
def revision_needs_hub_model(run: Run) -> Iterator[RuleViolation]:
    """revision is set only if model_name is a model id of the Hugging Face hub.

    A local folder has no revisions, and the loader refuses a revision for a folder.
    """
    if run.value("model.revision") is not None and _model_folder(run) is not None:
        yield RuleViolation(
            "model.revision",
            "a revision is only for models of the hub, but model_name is a folder",
            notes=(run.describe(_NAME),),
            fixes=(run.set_fix("model.revision", None),),
        )


@rule(
    "MODEL003",
    _NAME,
    example="model:\n  model_name: runs/old/adapter",
    fix="set model_name to the base model, and lora.adapter_path to runs/old/adapter",
)
def model_is_not_an_adapter(run: Run) -> Iterator[RuleViolation]:
    """model_name is a model, not the folder of an adapter.

    To start from an adapter, set lora.adapter_path to the adapter's folder, and model_name to the
    base model. adapter_config.json in the adapter's folder contains the name of the base model.
    """
    folder = _model_folder(run)
    if folder is None or not is_adapter(folder):
        return
    adapter_config = read_json(folder / ADAPTER_CONFIG)
    base = (
        adapter_config.get("base_model_name_or_path") if isinstance(adapter_config, dict) else None
    )
    model_name = run.value(_NAME)
    base = base if isinstance(base, str) and base else "the base model"
    yield RuleViolation(
        _NAME,
        f"is the folder of an adapter of {base}, not a model",
        notes=(str(folder / ADAPTER_CONFIG),),
        fixes=(Fix(f"set model_name to {base}, and lora.adapter_path to {model_name}"),),
    )


@rule(
    "MODEL004",
    _NAME,
    example="model:\n  model_name: ./pickled  # pytorch_model.bin alone",
    fix="use a checkpoint in safetensors format",
)
def weights_are_safetensors(run: Run) -> Iterator[RuleViolation]:
    """The folder of a model contains safetensors files.

    A pickle (*.bin) can run code when it is read, and no key of a run file can allow that.
    """
    folder = _model_folder(run)
    if folder is None or not path_exists(folder / "config.json"):
        return
    if any(folder.glob("*.safetensors")) or not any(folder.glob("*.bin")):
        return
    yield RuleViolation(
        _NAME,
        "the folder contains only pickled weights (*.bin), and reading a pickle can run code",
        notes=(str(folder),),
    )


@rule(
    "MODEL005",
    f"{_NAME} model.trust_remote_code",
    example="model:\n  model_name: google/gemma-3-27b-it",
    fix="use a text-only checkpoint",
)
def architecture_is_supported(run: Run) -> Iterator[RuleViolation]:
    """The model is a text-only causal language model.

    The loader refuses multimodal models and encoders. The code of the model must be part of
    transformers or of the checkpoint. Code in the checkpoint needs trust_remote_code: true. If the
    model is on this machine, the rule checks it with the installed transformers.
    """
    if run.model is None:
        return
    family = run.model.config.get("model_type")
    if not isinstance(family, str):
        return
    transformers_support = model_type(family)
    problem = architecture_problem(
        run.model.config,
        trust_remote_code=bool(run.get("model.trust_remote_code")),
        known=transformers_support.is_known,
        causal=transformers_support.is_causal,
    )
    if problem is not None:
        yield violation_for(run, problem, note=f"from {run.model.source}")


@rule(
    "MODEL006",
    f"{_NAME} model.load_in_4bit model.load_in_8bit",
    example="model:\n  model_name: TheBloke/Llama-2-7B-AWQ",
    fix="use the 16-bit checkpoint of the model",
)
def quantized_format_is_supported(run: Run) -> Iterator[RuleViolation]:
    """A quantized checkpoint must be in the format of bitsandbytes. A 4-bit checkpoint needs
    load_in_4bit: true, and an 8-bit checkpoint needs load_in_8bit: true.

    Training on AWQ, GPTQ, FP8, MXFP4 or compressed-tensors weights is not supported. 8-bit
    bitsandbytes weights are supported without the vLLM engine. The rule is checked if the model is
    on this machine.
    """
    if run.model is None or storage_format(run.model.config) is None:
        return
    problem = storage_problem(
        run.model.config,
        load_in_4bit=bool(run.get("model.load_in_4bit")),
        load_in_8bit=bool(run.get("model.load_in_8bit")),
        engine=run.engine == "vllm",
    )
    if problem is not None:
        yield violation_for(run, problem, note=f"quantization_config in {run.model.source}")


@rule(
    "MODEL007",
    f"{_NAME} runtime.engine",
    example="model: {model_name: org/new-architecture}\nruntime: {engine: vllm}",
    fix="runtime.engine: transformers",
)
def engine_supports_architecture(run: Run) -> Iterator[RuleViolation]:
    """With the vLLM engine, the installed vLLM supports the model's architecture.

    The rule is checked if the model is on this machine and vLLM is installed.
    """
    if run.engine == "transformers" or run.model is None:
        return
    architectures = run.model.config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        return
    try:
        is_supported = vllm_supports_any(map(str, architectures))
    except OSError:
        return
    if is_supported is False:
        yield RuleViolation(
            _NAME,
            f"the installed vLLM does not support {', '.join(map(str, architectures))}",
            notes=(f"architectures in {run.model.source}; {run.describe('runtime.engine')}",),
            fixes=(run.set_fix("runtime.engine", "transformers"),),
            severity=Severity.ERROR if run.engine == "vllm" else Severity.WARNING,
        )
