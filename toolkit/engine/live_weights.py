"""List the engine's parameters, not copied, by their plain names, and the parts of its fused
layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

READ_NAMES = "_toolkit_read_names"
"""Attribute that ``engine.weight_loader`` sets on the module: the names of the tensors in the
checkpoint's files.
"""

AS_LOADED = "_toolkit_as_loaded"
"""Attribute that ``engine.weight_loader`` sets on the module: a mapping from plain name to
``sample`` of the loaded values.
"""
SAMPLE_SIZE = 64


@dataclass(frozen=True, slots=True)
class LiveWeights:
    """The engine's own tensors, not copies: writing to one of them changes the output of the
    engine.
    """

    parameters: Mapping[str, torch.Tensor]
    """A mapping from plain name (without ``base_layer``) to tensor; a tied parameter is listed
    under each of its names.
    """
    packed: Mapping[str, tuple[str, ...]]
    """A mapping from fused layer to its parts in order, e.g. ``qkv_proj -> (q_proj, k_proj,
    v_proj)``; it is the model's own mapping.
    """
    padded: frozenset[str]
    """Names of embeddings and heads, whose rows (the vocabulary) the engine may have padded."""
    read_names: frozenset[str]
    """Names of the tensors in the checkpoint; empty if another loader read the checkpoint."""
    rewritten: frozenset[str]
    """Names of tensors that vLLM rewrote for a kernel after loading: they no longer have the
    checkpoint's values.
    """


def borrow(module: nn.Module) -> LiveWeights:
    """The engine's own tensors in a vLLM module."""
    parameters = plain_parameters(module)
    return LiveWeights(
        parameters=parameters,
        packed=packed_modules(module),
        padded=padded_parameters(module),
        read_names=getattr(module, READ_NAMES, frozenset()),
        rewritten=rewritten(parameters, getattr(module, AS_LOADED, {})),
    )


def sample(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of at most ``SAMPLE_SIZE`` values, spread over the tensor."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLE_SIZE)][:SAMPLE_SIZE].clone()


def rewritten(
    parameters: Mapping[str, torch.Tensor], as_loaded: Mapping[str, torch.Tensor]
) -> frozenset[str]:
    """Names of tensors that changed after loading; empty if no samples were recorded."""
    changed = set()
    for name, tensor in parameters.items() if as_loaded else ():
        before = as_loaded.get(name)
        # Compare bytes, because NaN is not equal to itself.
        if before is None or not before.view(torch.uint8).equal(sample(tensor).view(torch.uint8)):
            changed.add(name)
    return frozenset(changed)


def plain_parameters(module: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of a vLLM module by their names without ``base_layer``, which vLLM adds with
    LoRA.
    """
    named = module.named_parameters(remove_duplicate=False)
    return {name.replace(".base_layer.", "."): tensor for name, tensor in named}


def packed_modules(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """A mapping from fused layer to its parts, collected from all submodules that define one."""
    found: dict[str, tuple[str, ...]] = {}
    for child in module.modules():
        mapping = getattr(child, "packed_modules_mapping", None)
        if isinstance(mapping, dict):
            found |= {fused: tuple(parts) for fused, parts in mapping.items()}
    return found


def padded_parameters(module: nn.Module) -> frozenset[str]:
    """Names of the weights and biases of vocabulary layers, which have ``num_embeddings_padded``
    (VocabParallelEmbedding).
    """
    names = set()
    for path, child in module.named_modules(remove_duplicate=False):
        if hasattr(child, "num_embeddings_padded"):
            for name, _ in child.named_parameters(recurse=False):
                names.add(f"{path}.{name}".replace(".base_layer.", "."))
    return frozenset(names)


def rename_mapper(module: Any) -> Any | None:
    """The model's name mapper without the fusion of q/k/v, which would give the adapters of q, k
    and v the same name.

    The method is ``get_unstacked_mapper`` in vLLM 0.25.1 and ``get_rename_mapper`` in 0.31.0. None
    if the model has no mapper.
    """
    mapper = getattr(module, "hf_to_vllm_mapper", None)
    if mapper is None:
        return None
    make = getattr(mapper, "get_rename_mapper", None) or mapper.get_unstacked_mapper
    return make()


def engine_name(module: Any, name: str) -> str:
    """The engine's name of a Hugging Face module or parameter; parts of fused layers keep their own
    names.
    """
    mapper = rename_mapper(module)
    if mapper is None:
        return name
    mapped = mapper.apply_list([name])
    return str(mapped[0]) if mapped else name


def uses_transformers_backend(module: Any) -> bool:
    """True if vLLM has no model class for the architecture and runs Hugging Face's."""
    return type(module).__module__.startswith("vllm.model_executor.models.transformers")


STATES = "bnb_quant_state"
OFFSETS = "bnb_shard_offsets"


def is_packed(tensor: torch.Tensor) -> bool:
    """True for a 4-bit weight of the engine.

    vLLM (read at 0.25.1) keeps the weights of a fused layer as one packed tensor (n, 1) of uint8,
    two NF4 values per byte. Its attributes are ``bnb_shard_offsets`` (start of each part, in bytes)
    and ``bnb_quant_state`` {part: QuantState}, whose absmax is no longer quantized.
    """
    return isinstance(getattr(tensor, STATES, None), dict)


def logical_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape (out, in) of the weight that is packed in ``tensor``; the shape of ``tensor`` if it
    is not packed.
    """
    if not is_packed(tensor):
        return tuple(tensor.shape)
    states = ordered_states(tensor)
    return (
        sum(int(state.shape[0]) for state in states),
        *(int(size) for size in states[0].shape[1:]),
    )


def ordered_states(tensor: torch.Tensor) -> list[Any]:
    """The quantization states of the parts of ``tensor``, in the order of the parts."""
    states: Mapping[int, Any] = getattr(tensor, STATES)
    return [states[index] for index in sorted(states)]
