"""Identify base models, so that an adapter is never used with the wrong base model.

A base model has two short digests. The first is the digest of the checkpoint's files. This digest
does not depend on how the checkpoint is loaded (with or without an engine, in 4 bits, in any dtype,
from any number of shards). The second is the digest of the loaded weights. This digest also exists
for a model without local files. It is the same for a copy of the model whose files have another
layout. Two base models are the same if one of the two digests is equal.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from toolkit.base.errors import InputError
from toolkit.policy.model_files import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from transformers import PreTrainedModel

ADAPTER_NAME_PARTS = ("lora_", ".modules_to_save.", "trainable_tokens")
WRAPPER_NAME_PARTS = (".base_layer.", ".original_module.", ".token_adapter.")
"""Parts of PEFT's parameter names. Those in ``ADAPTER_NAME_PARTS`` occur in the names of adapter
parameters. Those in ``WRAPPER_NAME_PARTS`` come from PEFT's wrappers around base layers.
"""

VALUES_PER_TENSOR = 16
"""The number of values of each tensor that a digest includes."""
MAX_SAMPLED_TENSORS = 1024
"""The maximum number of tensors of a checkpoint whose values a digest includes. The names and
shapes of all tensors are included.
"""

DIGESTS_ATTRIBUTE = "toolkit_as_loaded"
"""The name of the model attribute that stores the ``BaseDigests`` from the time of loading. Base
models that this package loaded have it.
"""


@dataclass(frozen=True, slots=True)
class BaseDigests:
    """The digest of a base model's files and the digest of its loaded weights. A digest is None if
    it cannot be computed.
    """

    checkpoint: str | None
    weights: str | None


def store_base_digests(model: PreTrainedModel, folder: Path) -> None:
    """Compute the digests of ``model``, and store them in an attribute of ``model``. ``folder`` is
    the checkpoint that the model was loaded from.
    """
    setattr(model, DIGESTS_ATTRIBUTE, BaseDigests(checkpoint_digest(folder), weights_digest(model)))


def current_base_digests(model: PreTrainedModel) -> BaseDigests:
    """Return the current digests of ``model``.

    The digest of the files is None if the weights have changed since they were loaded, for example
    because an adapter was merged.
    """
    base, weights = _base_model(model), weights_digest(model)
    digests_at_load: BaseDigests | None = getattr(base, DIGESTS_ATTRIBUTE, None)
    unchanged = digests_at_load is not None and digests_at_load.weights == weights
    return BaseDigests(
        digests_at_load.checkpoint if digests_at_load is not None and unchanged else None, weights
    )


def is_recorded_base(recorded: Mapping[str, Any], model: PreTrainedModel) -> bool | None:
    """Return whether ``model`` is the base model that ``recorded`` (the contents of a base.json)
    describes. Returns None if no digest can be compared.
    """
    digests = current_base_digests(model)
    weights = recorded.get("fingerprint")
    pairs = [
        (recorded.get("checkpoint"), digests.checkpoint),
        (weights, digests.weights),
        # For a model with an engine, version 0.1 of the toolkit listed a tied head as a separate
        # parameter. Compare also the digest that this version computed.
        (weights, weights_digest(model, tied_twice=True)),
    ]
    comparisons = [
        recorded_digest == model_digest
        for recorded_digest, model_digest in pairs
        if recorded_digest is not None and model_digest is not None
    ]
    return any(comparisons) if comparisons else None


def unwrapped_name(name: str) -> str:
    """Return a parameter's name without the parts that PEFT's wrappers add."""
    for part in WRAPPER_NAME_PARTS:
        name = name.replace(part, ".")
    return name


def weights_digest(model: PreTrainedModel, *, tied_twice: bool = False) -> str | None:
    """Return a digest of the names, shapes and a few values of all frozen weights.

    The values are rounded to bfloat16, so that a bfloat16 checkpoint has the same digest in every
    dtype. Returns None if the weights are quantized, or if this process has only a part of the
    model. If ``tied_twice`` is True, tied weights are listed under each of their names.
    """
    if getattr(_base_model(model), "toolkit_mesh", None) is not None:
        return None
    digest = hashlib.sha256()
    for name, parameter in _base_model(model).named_parameters(remove_duplicate=not tied_twice):
        if not name.endswith("weight") or any(part in name for part in ADAPTER_NAME_PARTS):
            continue  # skip biases, which may be trained, and adapter weights
        if not parameter.is_floating_point():
            return None
        values = (
            parameter.detach().reshape(-1)[:VALUES_PER_TENSOR].to("cpu", torch.bfloat16).float()
        )
        digest.update(unwrapped_name(name).encode())
        digest.update(repr((tuple(parameter.shape), values.tolist())).encode())
    return digest.hexdigest()[:16]


def checkpoint_digest(folder: Path) -> str | None:
    """Return a digest of the names, shapes and a few values of the tensors in the safetensors files
    of a checkpoint.

    Floating-point values are rounded to bfloat16. Returns None if there are no safetensors files.

    Raises:
        InputError: a file cannot be read.
    """
    files = _safetensors_files(folder)
    if not files:
        return None
    try:
        return _digest_files(files)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"the model's weights cannot be read: {error}", where=str(folder)
        ) from error


def _safetensors_files(folder: Path) -> list[Path]:
    """Return the safetensors files that transformers reads: ``model.safetensors``, or if it does
    not exist, the files that the index lists.
    """
    single, index = folder / "model.safetensors", "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not (folder / index).is_file():
        return []
    shards = Checkpoint(folder, str(folder)).read_json(index).get("weight_map", {})
    return [folder / name for name in sorted(set(shards.values()))]


def _digest_files(files: list[Path]) -> str:
    names = sorted((name, file) for file in files for name in _tensor_names(file))
    stride = max(1, -(-len(names) // MAX_SAMPLED_TENSORS))
    sampled = set(names[::stride])
    description_by_name: dict[str, str] = {}
    for file in files:
        with safe_open(str(file), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                stored = opened.get_slice(name)
                shape = tuple(stored.get_shape())
                values = _sample_values(stored, shape) if (name, file) in sampled and shape else []
                description_by_name[name] = repr((shape, values))
    digest = hashlib.sha256()
    for name in sorted(description_by_name):
        digest.update(f"{name}{description_by_name[name]}".encode())
    return digest.hexdigest()[:16]


def _tensor_names(file: Path) -> Iterator[str]:
    with safe_open(str(file), framework="pt") as opened:
        yield from opened.keys()


def _sample_values(stored: Any, shape: tuple[int, ...]) -> list[Any]:
    """Return a few values of the tensor ``stored``: along the last axis the first
    ``VALUES_PER_TENSOR`` values, and along each other axis only index 0.
    """
    if 0 in shape:
        return []
    sample = stored[(*(slice(0, 1) for _ in shape[1:]), slice(0, VALUES_PER_TENSOR))].reshape(-1)
    if sample.is_floating_point():
        sample = sample.to(torch.bfloat16).float()
    values: list[Any] = sample.tolist()
    return values


def _base_model(model: PreTrainedModel) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
