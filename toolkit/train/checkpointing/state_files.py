"""Convert the state of a run (random generators, optimizer, buffered rollouts) to JSON and tensors,
and back without any change.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from toolkit.base.errors import ConfigError, UnsupportedError
from toolkit.engine.shards import full_shape, gather_full_tensor, local_shard, shard_of
from toolkit.policy.machine_facts import cuda_in_use

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from transformers import PreTrainedModel

Tensors = dict[str, torch.Tensor]


def generator_states() -> tuple[dict[str, Any], Tensors]:
    """Return the state of every random generator of this process. The states of Python's and
    numpy's generators are JSON. The states of torch's generators (CPU and current CUDA device) are
    byte tensors.
    """
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states = {
        "python": [version, list(words), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
    }
    tensors = {"generator.cpu": torch.random.get_rng_state()}
    if cuda_in_use():
        tensors["generator.cuda"] = torch.cuda.get_rng_state()
    return states, tensors


def restore_generators(states: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Restore the states that ``generator_states`` returned."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.random.set_rng_state(tensors["generator.cpu"])
    if "generator.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["generator.cuda"])


def flatten(value: object, tensors: Tensors, path: str) -> Any:
    """Return ``value`` as JSON, and add a copy of each tensor in ``value`` to ``tensors``. The key
    of a tensor in ``tensors`` is the path that leads to it: ``path``, then the keys and indices
    inside ``value``. Dicts keep the types of their keys.

    Raises:
        UnsupportedError: a part of ``value`` is neither JSON nor a tensor. The message has the
            path of this part.
    """
    if isinstance(value, torch.Tensor):
        # A copy, because the tensor may change later, and safetensors does not accept shared
        # storage.
        tensors[path] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": path}
    if isinstance(value, dict):
        items = [[key, flatten(item, tensors, f"{path}.{key}")] for key, item in value.items()]
        return {"dict": items}
    if isinstance(value, (list, tuple)):
        items = [flatten(item, tensors, f"{path}.{index}") for index, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise UnsupportedError(
        f"a {type(value).__name__} cannot be stored without pickle",
        where=f"checkpoint state {path}",
    )


def unflatten(
    structure: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    device: torch.device | str = "cpu",
) -> Any:
    """Return the value that ``flatten`` split into ``structure`` (JSON) and ``tensors``. Tensors in
    the returned value are on ``device``.
    """
    ((kind, inner),) = structure.items()
    if kind == "tensor":
        return tensors[inner].to(device)
    if kind == "dict":
        return {key: unflatten(item, tensors, device) for key, item in inner}
    if kind in ("list", "tuple"):
        items = [unflatten(item, tensors, device) for item in inner]
        return tuple(items) if kind == "tuple" else items
    return inner


def stored_name(name: str, adapter: str = "default") -> str:
    """The name under which PEFT stores a trainable parameter of an adapter."""
    return (
        name.replace(f".modules_to_save.{adapter}.", ".")
        .replace(f".{adapter}.", ".")
        .removesuffix(f".{adapter}")
    )


def trainable_parameters(model: PreTrainedModel) -> Tensors:
    """The trainable parameters, by the name under which PEFT stores them."""
    return {stored_name(name): p for name, p in model.named_parameters() if p.requires_grad}


def gather_trainable(model: PreTrainedModel) -> Tensors:
    """Return the parameters of ``trainable_parameters`` as complete tensors. If processes share a
    model, each process has only a part of a tensor. All these processes must then call this
    function.
    """
    return {
        name: gather_full_tensor(parameter)
        for name, parameter in trainable_parameters(model).items()
    }


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the optimizer's state_dict. If processes share a model, their parts of each tensor are
    joined. So the result is the same as with one process per model.
    """
    return _convert_state(optimizer, optimizer.state_dict(), gather_full_tensor)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state from ``optimizer_state``. If processes share a model, each process loads only
    its part of each tensor.
    """
    optimizer.load_state_dict(_convert_state(optimizer, state, local_shard))


def _convert_state(
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    convert: Callable[[torch.Tensor, Any], torch.Tensor],
) -> dict[str, Any]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not any(shard_of(parameter) for parameter in parameters):
        return state
    converted = {}
    for number, parameter_state in state["state"].items():
        parameter = parameters[number]
        shapes = (parameter.shape, full_shape(parameter))
        converted[number] = {
            name: convert(value, parameter)
            if isinstance(value, torch.Tensor) and value.shape in shapes
            else value
            for name, value in parameter_state.items()
        }
    return {**state, "state": converted}


def copy_into_parameters(
    parameters: Mapping[str, torch.Tensor], stored: Mapping[str, torch.Tensor], where: str
) -> None:
    """Copy ``stored`` into the parameters of the same names, after a check of names, shapes and
    values.

    Raises:
        ConfigError: names or shapes differ, or a value is not finite. The message has the first
            fault.
    """
    problem = find_difference(parameters, stored)
    if problem:
        raise ConfigError(
            f"the adapter in the checkpoint does not belong to this run: {problem}",
            where=where,
            fix="resume from a checkpoint of this run, or begin another run with --output-dir",
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(local_shard(stored[name], parameter))


def find_difference(
    parameters: Mapping[str, torch.Tensor], stored: Mapping[str, torch.Tensor]
) -> str | None:
    """Return why ``stored`` cannot be copied into ``parameters``, or None."""
    if missing := sorted(set(parameters) - set(stored)):
        return f"{len(missing)} tensors are missing, the first is {missing[0]}"
    if extra := sorted(set(stored) - set(parameters)):
        return f"{len(extra)} tensors are unexpected, the first is {extra[0]}"
    for name, parameter in parameters.items():
        if full_shape(parameter) != stored[name].shape:
            return (
                f"{name} has shape {list(stored[name].shape)}, but the model needs "
                f"{list(full_shape(parameter))}"
            )
        if not torch.isfinite(stored[name]).all():
            return f"{name} has NaN or infinite values"
    return None


def changed_keys(
    current: Mapping[str, Any], recorded: Mapping[str, Any], allowed: Sequence[str]
) -> list[str]:
    """Return the dotted keys whose values differ between the run ``current`` and the run
    ``recorded``. A key is left out if ``allowed`` has the key or a section that contains it.
    """
    keys = sorted(set(current) | set(recorded))
    differing = [key for key in keys if current.get(key) != recorded.get(key)]
    return [
        key
        for key in differing
        if not any(key == name or key.startswith(f"{name}.") for name in allowed)
    ]
