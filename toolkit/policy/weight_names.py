"""Map each Hugging Face parameter to rows of an engine tensor. The functions use only names and
shapes, not the tensors.

The engine fuses layers (``qkv_proj`` has the rows of q, then k, then v) and pads the vocabulary.
``packed_modules_mapping`` of vLLM's model class defines which layers are fused and in what order.
The shapes of the Hugging Face parameters define the rows of each part. So the code works for every
architecture.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolkit.base.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    Shape = tuple[int, ...]
    Rename = Callable[[str], str]

SHARE_WEIGHTS_KEY = "model.share_weights"
FALLBACK_ADVICE = (
    "set share_weights: false (the trainer then has its own copy of the weights), or set "
    "fast_inference: false"
)

EXPERT_TENSORS = {"gate_up_proj": "w13_weight", "down_proj": "w2_weight"}
"""A mapping from Hugging Face's names of expert tensors (transformers 5) to vLLM's names. In
Hugging Face and in vLLM, each tensor has all experts of a layer and the shape (expert, out, in).
"""
EXPERT_MODULES = ("routed_experts", "")
"""The possible names, in vLLM 0.25.1 to 0.31.0, of the module that contains the expert tensors
within the ``experts`` module. The empty name means that ``experts`` itself contains them.
"""
SINGLE_EXPERT_PATTERN = re.compile(r".*\.experts\.\d+\.(.+)")
"""The pattern for the name of a tensor of a single expert, as in most checkpoints. The group of the
pattern is the name of the tensor within the expert.
"""


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of the engine's tensor ``source``: ``rows`` rows, beginning with row ``start``."""

    source: str
    start: int
    rows: int


@dataclass(frozen=True, slots=True)
class EngineTensors:
    """Facts about the engine's tensors: the shapes by name, the fused layers and their parts, the
    tensors that may be padded, and the tensors that vLLM has rewritten.
    """

    shapes: Mapping[str, Shape]
    packed_modules: Mapping[str, Sequence[str]]
    padded_names: frozenset[str] = frozenset()
    rewritten_names: frozenset[str] = frozenset()


def plan_slices(
    parameter_shapes: Mapping[str, Shape],
    tied: Iterable[frozenset[str]],
    tensors: EngineTensors,
    rename: Rename,
) -> dict[str, Slice]:
    """Return, for every Hugging Face parameter, the slice of an engine tensor that has its values.

    Args:
        parameter_shapes: the Hugging Face parameters (name -> shape). Tied parameters are listed
            under each of their names.
        tied: groups of names that belong to the same parameter.
        tensors: the engine's tensors.
        rename: converts a Hugging Face name to an engine name. Parts of fused layers keep their
            own names.

    Raises:
        UnsupportedError: a parameter has no tensor in the engine, or its shape differs. The message
            names the parameter and the reason.
    """
    slices: dict[str, Slice] = {}
    problems: dict[str, str] = {}
    for name, shape in parameter_shapes.items():
        try:
            slices[name] = find_slice(name, shape, parameter_shapes, tensors, rename)
        except UnsupportedError as problem:
            problems[name] = problem.message
    for group in tied:
        # Tied names are one parameter, so all of them get the same slice. The engine may have only
        # one of the names.
        group_slice = next(
            (slices[name] for name in parameter_shapes if name in group and name in slices), None
        )
        if group_slice is not None:
            slices |= dict.fromkeys(group, group_slice)
            problems = {name: reason for name, reason in problems.items() if name not in group}
    if problems:
        lines = [f"{name}: {reason}" for name, reason in list(problems.items())[:5]]
        remainder = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise UnsupportedError(
            "these weights cannot be shared: " + "; ".join(lines) + remainder,
            where=SHARE_WEIGHTS_KEY,
            fix=FALLBACK_ADVICE,
        )
    return slices


def find_slice(
    name: str,
    shape: Shape,
    parameter_shapes: Mapping[str, Shape],
    tensors: EngineTensors,
    rename: Rename,
) -> Slice:
    """Return the slice for the parameter ``name``.

    Raises:
        UnsupportedError: the engine has no tensor for the parameter, or its shape differs.
    """
    target = rename(name)
    if target in tensors.shapes:
        return full_slice(target, shape, tensors)
    layer, _, attribute = target.rpartition(".")
    for inner in EXPERT_MODULES if attribute in EXPERT_TENSORS else ():
        source = join_names(layer, inner, EXPERT_TENSORS[attribute])
        if source in tensors.shapes:
            return full_slice(source, shape, tensors)
    parent, _, layer_name = layer.rpartition(".")
    for fused, parts in tensors.packed_modules.items():
        source = join_names(parent, fused, attribute)
        if layer_name in parts and source in tensors.shapes:
            hf_layer = name.rpartition(".")[0]
            hf_parent = hf_layer.rpartition(".")[0]
            return fused_slice(
                layer_name,
                parts,
                [parameter_shapes.get(join_names(hf_parent, part, attribute)) for part in parts],
                source,
                tensors,
            )
    raise UnsupportedError("the engine does not have this tensor")


def full_slice(source: str, shape: Shape, tensors: EngineTensors) -> Slice:
    """Return a slice with all rows of the engine's tensor ``source``. If the engine has padded this
    tensor, the slice has only the rows before the padding.

    Raises:
        UnsupportedError: the slice would not have the shape ``shape``.
    """
    available_shape = usable_shape(source, tensors)
    is_padded = (
        source in tensors.padded_names
        and available_shape[1:] == shape[1:]
        and available_shape[0] >= shape[0]
    )
    if available_shape != shape and not is_padded:
        raise UnsupportedError(
            f"the shape is {list(shape)} in the model, but {list(available_shape)} in the engine's "
            f"{source}"
        )
    return Slice(source, 0, shape[0])


def fused_slice(
    layer_name: str,
    parts: Sequence[str],
    shapes: Sequence[Shape | None],
    source: str,
    tensors: EngineTensors,
) -> Slice:
    """Return the slice of the fused tensor ``source`` that belongs to the layer ``layer_name``,
    such as q_proj. ``parts`` are the names of the fused layers. ``shapes`` are the shapes of the
    tensors of these layers. Both lists have the order of the rows in ``source``.

    Raises:
        UnsupportedError: the model lacks one of the fused layers, or the shapes do not add up to
            the shape of ``source``.
    """
    fused_shape = usable_shape(source, tensors)
    known_shapes = [shape for shape in shapes if shape is not None]
    if len(known_shapes) != len(parts):
        missing = [part for part, shape in zip(parts, shapes, strict=True) if shape is None]
        raise UnsupportedError(
            f"the engine's {source} also contains {', '.join(missing)}, which this model does "
            "not have"
        )
    if sum(shape[0] for shape in known_shapes) != fused_shape[0] or any(
        shape[1:] != fused_shape[1:] for shape in known_shapes
    ):
        raise UnsupportedError(
            f"the shapes of the parts, {[list(s) for s in known_shapes]}, do not add up to the "
            f"shape {list(fused_shape)} of the engine's {source}"
        )
    index = list(parts).index(layer_name)
    return Slice(source, sum(shape[0] for shape in known_shapes[:index]), known_shapes[index][0])


def usable_shape(source: str, tensors: EngineTensors) -> Shape:
    """Return the shape of the engine tensor ``source``.

    Raises:
        UnsupportedError: vLLM has rewritten the tensor, so it no longer has the checkpoint's
            values.
    """
    if source in tensors.rewritten_names:
        raise UnsupportedError(f"vLLM has rewritten {source} for a kernel on this device")
    return tensors.shapes[source]


def expected_checkpoint_names(
    parameter_shapes: Mapping[str, Shape], checkpoint_names: Iterable[str]
) -> set[str]:
    """Return the tensor names that a checkpoint must have for the parameters ``parameter_shapes``.

    ``checkpoint_names`` has the names of the tensors in the checkpoint. A Hugging Face model has
    one parameter for all experts of a layer (``mlp.experts.down_proj``), but most checkpoints have
    one tensor per expert (``mlp.experts.7.down_proj.weight``). For such a checkpoint, the result
    has the names for every expert of every layer. If one expert has a tensor, all experts must have
    this tensor.
    """
    expert_tensor_names = {
        match[1] for name in checkpoint_names if (match := SINGLE_EXPERT_PATTERN.fullmatch(name))
    }
    names = set()
    for name, shape in parameter_shapes.items():
        layer = name.rpartition(".")[0]
        if expert_tensor_names and layer.endswith(".experts"):
            names |= {
                f"{layer}.{index}.{tensor_name}"
                for index in range(shape[0])
                for tensor_name in expert_tensor_names
            }
        else:
            names.add(name)
    return names


def join_names(*parts: str) -> str:
    """Join ``parts`` with dots. Empty parts are left out."""
    return ".".join(part for part in parts if part)
