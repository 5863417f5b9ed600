"""List the parameters of the engine (not copies of them), and the Hugging Face layers that each
fused layer of the engine consists of. Parameters are listed by their plain names, which are the
names without ``base_layer``. vLLM's LoRA wrappers add ``base_layer`` to a name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

READ_NAMES_ATTRIBUTE = "_toolkit_read_names"
"""The name of the module attribute in which ``engine.weight_loader`` stores the names of the
tensors in the checkpoint's files.
"""

LOADED_SAMPLES_ATTRIBUTE = "_toolkit_as_loaded"
"""The name of the module attribute in which ``engine.weight_loader`` stores a few loaded values of
each parameter: a mapping from plain name to ``sample_values``.
"""
SAMPLE_SIZE = 64


@dataclass(frozen=True, slots=True)
class LiveWeights:
    """The tensors of the engine, not copies. Writing to one of these tensors changes the output of
    the engine.
    """

    parameters: Mapping[str, torch.Tensor]
    """A mapping from plain name (without ``base_layer``) to tensor. A tied parameter is listed
    under each of its names.
    """
    packed_modules: Mapping[str, tuple[str, ...]]
    """A mapping from fused layer to its parts in order, e.g. ``qkv_proj -> (q_proj, k_proj,
    v_proj)``. vLLM's model class defines it.
    """
    padded_names: frozenset[str]
    """Names of the embedding and head parameters. Their rows are the vocabulary, and the engine may
    have added padding rows.
    """
    read_names: frozenset[str]
    """Names of the tensors in the checkpoint. Empty if the toolkit's loader did not read them."""
    rewritten_names: frozenset[str]
    """Names of tensors that vLLM rewrote for a kernel after loading. They no longer have the
    checkpoint's values.
    """


def find_live_weights(module: nn.Module) -> LiveWeights:
    """Return the engine's own tensors of a vLLM module, without copying them."""
    parameters = plain_parameters(module)
    return LiveWeights(
        parameters=parameters,
        packed_modules=packed_modules(module),
        padded_names=padded_parameters(module),
        read_names=getattr(module, READ_NAMES_ATTRIBUTE, frozenset()),
        rewritten_names=find_rewritten(parameters, getattr(module, LOADED_SAMPLES_ATTRIBUTE, {})),
    )


def sample_values(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of at most ``SAMPLE_SIZE`` values, spread evenly over the tensor."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLE_SIZE)][:SAMPLE_SIZE].clone()


def find_rewritten(
    parameters: Mapping[str, torch.Tensor], as_loaded: Mapping[str, torch.Tensor]
) -> frozenset[str]:
    """Return the names of the tensors whose values changed after loading. ``as_loaded`` has sampled
    values of each tensor from the time of loading. If the loader recorded no values, ``as_loaded``
    is empty and so is the result.
    """
    changed = set()
    for name, tensor in parameters.items() if as_loaded else ():
        loaded = as_loaded.get(name)
        # Compare bytes, because NaN is not equal to itself.
        if loaded is None or not loaded.view(torch.uint8).equal(
            sample_values(tensor).view(torch.uint8)
        ):
            changed.add(name)
    return frozenset(changed)


def plain_parameters(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters of a vLLM module by their plain names. A plain name is the name without
    ``base_layer``, which vLLM adds to the names of layers with LoRA.
    """
    named = module.named_parameters(remove_duplicate=False)
    return {name.replace(".base_layer.", "."): tensor for name, tensor in named}


def packed_modules(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return one mapping from the name of each fused layer to the names of its parts. It joins the
    mappings (``packed_modules_mapping``) that ``module`` and its submodules define.
    """
    merged: dict[str, tuple[str, ...]] = {}
    for child in module.modules():
        mapping = getattr(child, "packed_modules_mapping", None)
        if isinstance(mapping, dict):
            merged |= {fused: tuple(parts) for fused, parts in mapping.items()}
    return merged


def padded_parameters(module: nn.Module) -> frozenset[str]:
    """Return the names of the weights and biases of vocabulary layers. A vocabulary layer of vLLM
    (VocabParallelEmbedding) is recognized by its attribute ``num_embeddings_padded``.
    """
    names = set()
    for path, child in module.named_modules(remove_duplicate=False):
        if hasattr(child, "num_embeddings_padded"):
            for name, _ in child.named_parameters(recurse=False):
                names.add(f"{path}.{name}".replace(".base_layer.", "."))
    return frozenset(names)


def rename_mapper(module: Any) -> Any | None:
    """Return vLLM's mapper from Hugging Face names to engine names, or None if the model has none.

    The returned mapper does not map q_proj, k_proj and v_proj to one fused name, because their
    adapters would then have the same name. The vLLM method that returns this mapper is
    ``get_unstacked_mapper`` in 0.25.1 and ``get_rename_mapper`` in 0.31.0.
    """
    mapper = getattr(module, "hf_to_vllm_mapper", None)
    if mapper is None:
        return None
    get_mapper = getattr(mapper, "get_rename_mapper", None) or mapper.get_unstacked_mapper
    return get_mapper()


def engine_name(module: Any, name: str) -> str:
    """Return the engine's name of a Hugging Face module or parameter. A part of a fused layer keeps
    its own name, such as q_proj.
    """
    mapper = rename_mapper(module)
    if mapper is None:
        return name
    mapped = mapper.apply_list([name])
    return str(mapped[0]) if mapped else name


def uses_transformers_backend(module: Any) -> bool:
    """Return True if vLLM has no model class for the architecture, and therefore runs the class of
    Hugging Face transformers.
    """
    return type(module).__module__.startswith("vllm.model_executor.models.transformers")


QUANT_STATES_ATTRIBUTE = "bnb_quant_state"
OFFSETS_ATTRIBUTE = "bnb_shard_offsets"


def is_packed(tensor: torch.Tensor) -> bool:
    """Return True if ``tensor`` is a 4-bit weight of the engine.

    vLLM 0.25.1 keeps the weights of a fused layer as one packed tensor (n, 1) of uint8, with two
    NF4 values per byte. The tensor has two attributes. ``bnb_shard_offsets`` is the start of each
    part in bytes. ``bnb_quant_state`` is a dict {part: QuantState}, and the absmax values in each
    QuantState are already dequantized.
    """
    return isinstance(getattr(tensor, QUANT_STATES_ATTRIBUTE, None), dict)


def logical_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the shape (out, in) of the weight that is packed in ``tensor``. If ``tensor`` is not
    packed, return its own shape.
    """
    if not is_packed(tensor):
        return tuple(tensor.shape)
    states = ordered_states(tensor)
    return (
        sum(int(state.shape[0]) for state in states),
        *(int(size) for size in states[0].shape[1:]),
    )


def ordered_states(tensor: torch.Tensor) -> list[Any]:
    """Return the quantization states of the parts of ``tensor``, in the order of the parts."""
    states: Mapping[int, Any] = getattr(tensor, QUANT_STATES_ATTRIBUTE)
    return [states[index] for index in sorted(states)]
