"""Identify base models, so that an adapter is never put on the wrong one.

A base model has two short digests. The digest of the checkpoint's files does not depend on how the
checkpoint is loaded: with or without an engine, in 4 bits, in any dtype, from any number of shards.
The digest of the loaded weights also covers models without local files, and copies with another
layout. One equal digest is enough to identify a base model.
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

TRAINED = ("lora_", ".modules_to_save.", "trainable_tokens")
WRAPPERS = (".base_layer.", ".original_module.", ".token_adapter.")
"""Parts of PEFT's parameter names: parts that mark adapter parameters, and parts from its wrappers
around base layers.
"""

SAMPLE = 16
"""Number of values per tensor in a digest."""
SAMPLED_TENSORS = 1024
"""Number of tensors of a checkpoint whose values are read; the digest has the names and shapes of
all tensors.
"""

AS_LOADED = "toolkit_as_loaded"
"""Attribute of a base model that this package loaded: its ``BaseDigests`` when it was loaded."""


@dataclass(frozen=True, slots=True)
class BaseDigests:
    """The digests of a base model: of its files and of its loaded weights. None if there is no such
    digest.
    """

    checkpoint: str | None
    weights: str | None


def note_checkpoint(model: Any, folder: Path) -> None:
    """Record on the base model the digests of the checkpoint ``folder`` that it was loaded from."""
    setattr(model, AS_LOADED, BaseDigests(of_checkpoint(folder), of_weights(model)))


def marks_of(model: Any) -> BaseDigests:
    """The current digests of ``model``.

    The digest of the files is None if the weights have changed since they were loaded, for example
    because an adapter was merged.
    """
    base, weights = _base(model), of_weights(model)
    loaded: BaseDigests | None = getattr(base, AS_LOADED, None)
    unchanged = loaded is not None and loaded.weights == weights
    return BaseDigests(loaded.checkpoint if loaded is not None and unchanged else None, weights)


def is_base_of(recorded: Mapping[str, Any], model: Any) -> bool | None:
    """Whether ``model`` is the base model that ``recorded`` (a base.json) describes; None if no
    digest can be compared.
    """
    own = marks_of(model)
    weights = recorded.get("fingerprint")
    pairs = [
        (recorded.get("checkpoint"), own.checkpoint),
        (weights, own.weights),
        # With an engine, version 0.1 listed a tied head as a separate parameter.
        (weights, of_weights(model, tied_twice=True)),
    ]
    known = [theirs == ours for theirs, ours in pairs if theirs is not None and ours is not None]
    return any(known) if known else None


def plain_name(name: str) -> str:
    """A parameter's name without the parts that PEFT's wrappers add."""
    for part in WRAPPERS:
        name = name.replace(part, ".")
    return name


def of_weights(model: Any, *, tied_twice: bool = False) -> str | None:
    """The digest of names, shapes and a few values of every frozen weight, rounded to bfloat16.

    Values are rounded so that a bfloat16 checkpoint has the same digest in every dtype. None for
    quantized weights, and for a part of a model. With ``tied_twice`` tied weights are listed under
    each of their names.
    """
    if getattr(_base(model), "toolkit_mesh", None) is not None:
        return None
    digest = hashlib.sha256()
    for name, parameter in _base(model).named_parameters(remove_duplicate=not tied_twice):
        if not name.endswith("weight") or any(part in name for part in TRAINED):
            continue  # biases may be trained, so they are excluded
        if not parameter.is_floating_point():
            return None
        values = parameter.detach().reshape(-1)[:SAMPLE].to("cpu", torch.bfloat16).float()
        digest.update(plain_name(name).encode())
        digest.update(repr((tuple(parameter.shape), values.tolist())).encode())
    return digest.hexdigest()[:16]


def of_checkpoint(folder: Path) -> str | None:
    """The digest of names, shapes and a few values of the tensors in a checkpoint's safetensors.

    Floating-point values are rounded to bfloat16. None if there are no such files.

    Raises:
        InputError: a file cannot be read.
    """
    files = _files(folder)
    if not files:
        return None
    try:
        return _digest(files)
    except (SafetensorError, OSError) as error:
        raise InputError(f"its weights cannot be read: {error}", where=str(folder)) from error


def _files(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads, in the order in which it looks for them."""
    single, index = folder / "model.safetensors", "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not (folder / index).is_file():
        return []
    shards = Checkpoint(folder, str(folder)).read_json(index).get("weight_map", {})
    return [folder / name for name in sorted(set(shards.values()))]


def _digest(files: list[Path]) -> str:
    names = sorted((name, file) for file in files for name in _names(file))
    every = max(1, -(-len(names) // SAMPLED_TENSORS))
    sampled = set(names[::every])
    told: dict[str, str] = {}
    for file in files:
        with safe_open(str(file), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                part = opened.get_slice(name)
                shape = tuple(part.get_shape())
                values = _values(part, shape) if (name, file) in sampled and shape else []
                told[name] = repr((shape, values))
    digest = hashlib.sha256()
    for name in sorted(told):
        digest.update(f"{name}{told[name]}".encode())
    return digest.hexdigest()[:16]


def _names(file: Path) -> Iterator[str]:
    with safe_open(str(file), framework="pt") as opened:
        yield from opened.keys()


def _values(part: Any, shape: tuple[int, ...]) -> list[Any]:
    """The first values of the last axis, at index 0 of all other axes."""
    if 0 in shape:
        return []
    first = part[(*(slice(0, 1) for _ in shape[1:]), slice(0, SAMPLE))].reshape(-1)
    if first.is_floating_point():
        first = first.to(torch.bfloat16).float()
    values: list[Any] = first.tolist()
    return values


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
