"""Which rows of which engine tensor each Hugging Face parameter is. Pure: names and shapes in,
slices out.

The engine fuses layers (``qkv_proj`` holds q, k and v one under the other) and pads the vocabulary.
Which layers are fused, and in what order, is the model's own ``packed_modules_mapping``; how many
rows each part has is the Hugging Face shape. Nothing here knows an architecture.
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

WHY_SHARE = "model.share_weights"
FALLBACK = (
    "set share_weights: false (the trainer then holds a copy of its own), or fast_inference: false"
)

EXPERT_TENSORS = {"gate_up_proj": "w13_weight", "down_proj": "w2_weight"}
"""Stacked experts, Hugging Face (transformers 5) -> vLLM: (expert, out, in) on both sides."""
EXPERT_MODULES = ("routed_experts", "")
"""The module between the experts and their tensors in vLLM (0.25.1 to 0.31.0), or none."""
ONE_EXPERT = re.compile(r".*\.experts\.\d+\.(.+)")
"""A tensor of one expert, as most checkpoints store them; the group is its name in the expert."""


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows ``start`` to ``start + rows`` of the engine's tensor ``source``."""

    source: str
    start: int
    rows: int


@dataclass(frozen=True, slots=True)
class Sources:
    """The engine's side: shapes by name, fused layers and their parts, and the names that may be
    padded.
    """

    shapes: Mapping[str, Shape]
    packed: Mapping[str, Sequence[str]]
    padded: frozenset[str] = frozenset()
    rewritten: frozenset[str] = frozenset()


def plan_views(
    wanted: Mapping[str, Shape], tied: Iterable[frozenset[str]], sources: Sources, rename: Rename
) -> dict[str, Slice]:
    """A slice for every Hugging Face parameter of ``wanted`` (name -> shape).

    Args:
        wanted: Hugging Face parameters; tied ones under each of their names.
        tied: groups of names that are one parameter.
        sources: what the engine has.
        rename: a Hugging Face name -> the engine's, fused parts left apart.

    Raises:
        UnsupportedError: a parameter has no place in the engine, or its shape differs; it says
            which and why.
    """
    found: dict[str, Slice] = {}
    problems: dict[str, str] = {}
    for name, shape in wanted.items():
        try:
            found[name] = locate(name, shape, wanted, sources, rename)
        except UnsupportedError as problem:
            problems[name] = problem.message
    for group in tied:
        # One slice for all names, whatever names the engine has for it: one parameter, as loaded.
        placed = next((found[name] for name in wanted if name in group and name in found), None)
        if placed is not None:
            found |= dict.fromkeys(group, placed)
            problems = {name: why for name, why in problems.items() if name not in group}
    if problems:
        lines = [f"{name}: {why}" for name, why in list(problems.items())[:5]]
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise UnsupportedError(
            "these weights cannot be shared: " + "; ".join(lines) + more,
            where=WHY_SHARE,
            fix=FALLBACK,
        )
    return found


def locate(
    name: str, shape: Shape, wanted: Mapping[str, Shape], sources: Sources, rename: Rename
) -> Slice:
    """The slice of one parameter.

    Raises:
        UnsupportedError: there is none of that shape.
    """
    target = rename(name)
    if target in sources.shapes:
        return whole(target, shape, sources)
    layer, _, attribute = target.rpartition(".")
    for inner in EXPERT_MODULES if attribute in EXPERT_TENSORS else ():
        source = join(layer, inner, EXPERT_TENSORS[attribute])
        if source in sources.shapes:
            return whole(source, shape, sources)
    parent, _, leaf = layer.rpartition(".")
    for fused, parts in sources.packed.items():
        source = join(parent, fused, attribute)
        if leaf in parts and source in sources.shapes:
            hf_layer = name.rpartition(".")[0]
            hf_parent = hf_layer.rpartition(".")[0]
            return part_of(
                leaf,
                parts,
                [wanted.get(join(hf_parent, part, attribute)) for part in parts],
                source,
                sources,
            )
    raise UnsupportedError("the engine has no such tensor")


def whole(source: str, shape: Shape, sources: Sources) -> Slice:
    """All of a tensor, or its first rows where the engine has padded it."""
    have = available(source, sources)
    padded = source in sources.padded and have[1:] == shape[1:] and have[0] >= shape[0]
    if have != shape and not padded:
        raise UnsupportedError(f"shape {list(shape)} here, {list(have)} in the engine's {source}")
    return Slice(source, 0, shape[0])


def part_of(
    leaf: str, parts: Sequence[str], shapes: Sequence[Shape | None], source: str, sources: Sources
) -> Slice:
    """The rows of one part of a fused tensor: those after the parts before it."""
    have = available(source, sources)
    known = [shape for shape in shapes if shape is not None]
    if len(known) != len(parts):
        missing = [part for part, shape in zip(parts, shapes, strict=True) if shape is None]
        raise UnsupportedError(
            f"the engine's {source} also holds {', '.join(missing)}, which this model has not"
        )
    if sum(shape[0] for shape in known) != have[0] or any(shape[1:] != have[1:] for shape in known):
        raise UnsupportedError(
            f"the parts' shapes {[list(s) for s in known]} do not make up {list(have)} of {source}"
        )
    index = list(parts).index(leaf)
    return Slice(source, sum(shape[0] for shape in known[:index]), known[index][0])


def available(source: str, sources: Sources) -> Shape:
    """The shape of an engine tensor.

    Raises:
        UnsupportedError: its values are no longer those of the checkpoint.
    """
    if source in sources.rewritten:
        raise UnsupportedError(f"vLLM has rewritten {source} for its own kernel on this device")
    return sources.shapes[source]


def stored_names(wanted: Mapping[str, Shape], read: Iterable[str]) -> set[str]:
    """The names of ``wanted`` as a checkpoint with the tensors ``read`` has to spell them.

    Hugging Face stacks the experts of a layer (``mlp.experts.down_proj``, expert first) where most
    checkpoints have a tensor an expert (``mlp.experts.7.down_proj.weight``): then every expert of
    every layer needs each tensor that any of them has.
    """
    tails = {found[1] for name in read if (found := ONE_EXPERT.fullmatch(name))}
    names = set()
    for name, shape in wanted.items():
        layer = name.rpartition(".")[0]
        if tails and layer.endswith(".experts"):
            names |= {f"{layer}.{index}.{tail}" for index in range(shape[0]) for tail in tails}
        else:
            names.add(name)
    return names


def join(*parts: str) -> str:
    """A dotted name of the parts that are not empty."""
    return ".".join(part for part in parts if part)
