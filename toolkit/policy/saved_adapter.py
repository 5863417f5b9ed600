"""Read a saved adapter, check it, compare it with the model, and load it. The adapter's files are
not trusted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from toolkit.base.errors import (
    ConfigTypeError,
    ConfigValueError,
    InputError,
    UnsupportedError,
    first_line,
)
from toolkit.base.files import check_folder
from toolkit.config.adapter_facts import start_problem
from toolkit.config.lora_targets import pattern_fault, pattern_value
from toolkit.policy.adapter_io import BASE_FILE, base_model_name, read_tensors
from toolkit.policy.fingerprint import current_base_digests, is_recorded_base
from toolkit.policy.lora import (
    COMPARED_FIELDS,
    adapter_tensors,
    add_adapter_from_config,
    describe_differences,
    read_peft_config,
    refuse_unsupported_adapter,
    set_adapter_tensors,
    settings_from_peft,
)
from toolkit.policy.lora_settings import check_settings, check_targets
from toolkit.policy.model_files import ADAPTER_CONFIG, Checkpoint

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from transformers import PreTrainedModel

    from toolkit.policy.lora_settings import LoraSettings

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that was read from ``folder``. It has the PEFT config, the tensors (on the CPU)
    and ``base``, which identifies the base model.
    """

    folder: Path
    config: Any
    tensors: Mapping[str, torch.Tensor]
    base: Mapping[str, Any]


def read_adapter(folder: str | os.PathLike[str]) -> Adapter:
    """Read the adapter in ``folder``. Check that every value is finite, and that every LoRA matrix
    has the rank that the adapter's config gives for its module.

    Raises:
        InputError: a file is missing or unreadable.
        ConfigValueError: the adapter is not a LoRA adapter, its config cannot be used, its weights
            exist only as a pickle, a value is not finite, or the rank of a matrix differs from the
            config.
    """
    path = Path(folder)
    if not path.is_dir():
        raise InputError(
            "the path is not the folder of an adapter",
            where=str(folder),
            fix="use a folder that save_lora wrote",
        )
    check_folder(path)
    values = Checkpoint(path, str(path)).read_json(ADAPTER_CONFIG)
    try:
        config = read_peft_config(values)
        check_settings(settings_from_peft(config))
        _check_patterns(values)
    except (ConfigValueError, ConfigTypeError) as error:
        raise ConfigValueError(error.message, where=str(path / ADAPTER_CONFIG)) from error
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError, re.error) as error:
        raise ConfigValueError(  # PEFT failed on a value of the wrong type
            f"the file cannot be used: {first_line(error)}",
            where=str(path / ADAPTER_CONFIG),
            fix="copy the adapter again",
        ) from error
    tensors = _read_tensors(path)
    _check_values(tensors, path)
    _check_ranks(tensors, config, path)
    base: dict[str, Any] = {"base_model_name_or_path": values.get("base_model_name_or_path")}
    if (path / BASE_FILE).is_file():
        base |= Checkpoint(path, str(path)).read_json(BASE_FILE)
    return Adapter(path, config, tensors, base)


def _check_patterns(values: Mapping[str, Any]) -> None:
    """Check the regular expressions of an untrusted adapter. PEFT matches each of them with every
    module name, and a harmful expression could take very long.
    """
    for name in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
        value = values.get(name)
        for text in [value] if isinstance(value, str) else value if isinstance(value, dict) else ():
            fault = pattern_fault(text)
            if fault is not None:
                message = f"{name}: {text[:80]!r}: {fault}"
                raise ConfigValueError(message, fix=f"list the names of the modules in {name}")


def check_start_settings(adapter: Adapter, settings: LoraSettings) -> None:
    """Raise an error if a run with ``settings`` cannot start from ``adapter``.

    init_lora_weights is not compared, because the adapter's values already exist.

    Raises:
        ConfigTypeError: the settings differ. The message lists the differences.
        UnsupportedError: no run can start from an adapter of this kind.
    """
    problem = start_problem(adapter.config.to_dict())
    if problem is not None:
        raise UnsupportedError(
            problem.message, where=f"{problem.key}: {adapter.folder}", fix=problem.hint
        )
    names = [name for name in COMPARED_FIELDS if name != "init_lora_weights"]
    differing = describe_differences(adapter.config, settings, names)
    if differing:
        raise ConfigTypeError(
            f"the adapter to start from has other settings: {'; '.join(differing)}",
            where=str(adapter.folder),
            fix="remove the differing keys from the lora section, so that the adapter's values "
            "are used",
        )


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    file = path / ADAPTER_WEIGHTS
    if not file.is_file():
        if (path / "adapter_model.bin").is_file():
            raise ConfigValueError(
                "the folder has only a pickled adapter (adapter_model.bin), and a pickle can run "
                "code when it is loaded",
                where=str(path),
                fix=f"if you trust the file, convert it to {ADAPTER_WEIGHTS}",
            )
        raise InputError(
            f"{ADAPTER_WEIGHTS} is missing", where=str(path), fix="copy the whole folder"
        )
    return read_tensors(file)


def _check_values(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    not_finite = [name for name, value in tensors.items() if not _is_finite(value)]
    if not_finite:
        raise ConfigValueError(
            f"{len(not_finite)} of {len(tensors)} tensors contain NaN or infinity, the first is "
            f"{not_finite[0]}",
            where=str(path / ADAPTER_WEIGHTS),
            fix="use an earlier checkpoint of the run",
        )


def _is_finite(value: torch.Tensor) -> bool:
    """Return True if all values are finite. Values are converted to float32 first, because
    ``torch.isfinite`` does not support float8.
    """
    values = value.float() if value.is_floating_point() else value
    return bool(torch.isfinite(values).all())


def _check_ranks(tensors: Mapping[str, torch.Tensor], config: Any, path: Path) -> None:
    if not any(".lora_" in name for name in tensors):
        raise ConfigValueError("the file has no LoRA tensors", where=str(path / ADAPTER_WEIGHTS))
    for name, value in tensors.items():
        if value.dim() != 2 or not (".lora_A." in name or ".lora_B." in name):
            continue
        rank = value.shape[0] if ".lora_A." in name else value.shape[-1]
        module = name.removeprefix(PEFT_PREFIX).partition(".lora_")[0]
        expected_rank = pattern_value(config.rank_pattern or {}, module, config.r)
        if rank != expected_rank:
            raise ConfigValueError(
                f"{name} has rank {rank}, but {ADAPTER_CONFIG} has r={expected_rank}",
                where=str(path),
            )


def check_base_model(model: PreTrainedModel, adapter: Adapter) -> None:
    """Check that ``model`` is the base model that ``adapter`` was trained on. If both the adapter
    and the model have digests, the digests are compared. Otherwise their hub ids are compared.

    Raises:
        ConfigValueError: the adapter was trained on another base model. The message names the two
            base models.
    """
    adapter_base, model_name = adapter.base.get("base_model_name_or_path"), base_model_name(model)
    is_same = is_recorded_base(adapter.base, model)
    if is_same is not None:
        digests = current_base_digests(model)
        recorded_digest = adapter.base.get("checkpoint") or adapter.base.get("fingerprint")
        differ, detail = (
            not is_same,
            f" (the digest of its base model is {recorded_digest}, but this model's digest is "
            f"{digests.checkpoint or digests.weights})",
        )
    else:
        both_hub_ids = all(
            name and not Path(name).is_dir() and name.count("/") == 1
            for name in (adapter_base, model_name)
        )
        differ, detail = both_hub_ids and adapter_base != model_name, ""
    if differ:
        raise ConfigValueError(
            f"the adapter was trained on {adapter_base}, but this model is {model_name}{detail}",
            where=str(adapter.folder),
            fix="load the base model that the adapter was trained on",
        )


def check_adapter_tensors(
    model: PreTrainedModel, adapter: Adapter, *, name: str = "default"
) -> dict[str, torch.Tensor]:
    """Check that the tensors of the saved ``adapter`` match the tensors of the model's adapter
    ``name``. Returns the saved tensors.

    If an adapter is on embeddings or head, PEFT also saves the base model's tensors of these
    layers. These tensors must equal those of ``model``. They are not returned, so that base weights
    are never overwritten.

    Raises:
        ConfigValueError: tensors are missing, unexpected or of another shape. The message names the
            first such tensor.
    """
    expected, saved = adapter_tensors(model, name), dict(adapter.tensors)
    base_tensors = {
        f"{PEFT_PREFIX}{key}": value for key, value in model.get_base_model().named_parameters()
    }
    for key in sorted(saved.keys() - expected.keys()):
        base_tensor = base_tensors.get(key)
        if (
            base_tensor is not None
            and base_tensor.shape == saved[key].shape
            and _equal_in_bfloat16(base_tensor, saved[key])
        ):
            del saved[key]
    missing, unexpected = (
        sorted(expected.keys() - saved.keys()),
        sorted(saved.keys() - expected.keys()),
    )
    misshapen = [
        f"{key} with shape {tuple(saved[key].shape)}, but the model needs {tuple(value.shape)}"
        for key, value in expected.items()
        if key in saved and saved[key].shape != value.shape
    ]
    problems = [
        f"{len(affected)} {problem}, the first is {affected[0]}"
        for affected, problem in (
            (missing, "tensors are missing"),
            (unexpected, "tensors are unexpected"),
            (misshapen, "tensors have another shape"),
        )
        if affected
    ]
    if problems:
        raise ConfigValueError(
            f"the adapter's tensors do not match this model: {'; '.join(problems)}",
            where=str(adapter.folder),
            fix="load the base model that the adapter was trained on",
        )
    return saved


def _equal_in_bfloat16(base_tensor: torch.Tensor, saved_tensor: torch.Tensor) -> bool:
    """Return True if the tensors are equal after rounding to bfloat16. They are rounded because
    either tensor may have been stored in bfloat16.
    """
    return torch.equal(
        base_tensor.detach().to("cpu", torch.bfloat16), saved_tensor.to(torch.bfloat16)
    )


def add_saved_adapter(model: PreTrainedModel, adapter: Adapter, name: str = "default") -> Any:
    """Add the saved ``adapter`` to ``model`` under ``name``, and return the PEFT model. Base model,
    target modules and shapes are checked.

    Raises:
        ConfigValueError: the adapter belongs to another base model, or does not match the model's
            layers. The message names the difference.
    """
    check_base_model(model, adapter)
    settings = settings_from_peft(adapter.config)
    engine = getattr(model, "toolkit_engine", None)
    if engine is not None:
        refuse_unsupported_adapter(model, adapter.config, engine, str(adapter.folder))
    base_model = model.get_base_model() if hasattr(model, "get_base_model") else model
    check_targets(settings, (module for module, _ in base_model.named_modules()))
    peft_model = add_adapter_from_config(model, adapter.config, name)
    try:
        set_adapter_tensors(peft_model, check_adapter_tensors(peft_model, adapter, name=name), name)
    except ConfigValueError:
        if peft_model is model:
            model.delete_adapter(name)
        else:
            peft_model.unload()
        raise
    return peft_model
