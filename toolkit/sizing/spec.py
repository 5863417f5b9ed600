"""Read a ModelSpec from only config.json and safetensors headers. This module needs no torch,
downloads nothing and reads no weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.base.errors import InputError, UnsupportedError
from toolkit.base.files import read_json
from toolkit.config.lora_targets import default_targets
from toolkit.config.supported_features import is_multimodal, storage_format
from toolkit.sizing.config_fields import Fields
from toolkit.sizing.families import FAMILIES
from toolkit.sizing.headers import read_stored_weights
from toolkit.sizing.model_blocks import DTYPE_BYTES, ModelSpec
from toolkit.sizing.model_source import find_model
from toolkit.sizing.unknown_architecture import shape_from_headers
from toolkit.sizing.weight_formats import Quantization, parse_quantization

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from toolkit.sizing.families.common import Shape
    from toolkit.sizing.headers import StoredWeights

# The margin that is added to all terms for an unknown architecture.
UNKNOWN_MARGIN = 0.10
NOT_TRAINABLE = "the model is sized, but training it is not supported"


def read_spec(model: str, revision: str | None = None) -> ModelSpec:
    """Return the description of a model that is given as a folder, a config.json, or a cached hub
    id.

    Raises InputError if files are missing or broken. If the architecture is unknown, the sizes are
    read from the safetensors headers. Raises UnsupportedError if there are no such headers.
    """
    files = find_model(model, revision)
    values = read_json(files.config)
    if not isinstance(values, dict):
        raise InputError("the file is not a mapping", where=str(files.config))
    stored = read_stored_weights(files.folder) if files.folder else None
    return spec_from_values(values, name=model, where=str(files.config), stored=stored)


def spec_from_values(
    values: Mapping[str, Any],
    *,
    name: str,
    where: str = "config.json",
    stored: StoredWeights | None = None,
) -> ModelSpec:
    """Return the ModelSpec for ``values``, the content of a config.json, and ``stored``, the
    safetensors headers of the checkpoint, if there are any. Raises the errors of ``read_spec``.
    """
    fields = Fields(values, where)
    model_type = fields.text("model_type") or ""
    architectures = fields.items("architectures", str) or ()
    family = FAMILIES.get(model_type)
    quantization_section = fields.section("quantization_config")
    quantization = parse_quantization(
        quantization_section.values if quantization_section else None, where
    )
    notes: list[str] = []
    margin = 0.0
    if isinstance(quantization, str):
        notes.append(
            f"unknown weight format {quantization!r}: sizes come from the safetensors headers"
        )
        margin = UNKNOWN_MARGIN
        if stored is None:
            raise UnsupportedError(
                f"unknown weight format {quantization!r}, and there are no safetensors headers",
                where=where,
                fix="use a folder that contains the safetensors files",
            )
    elif quantization is not None and quantization.method == "mxfp4":
        # Marlin pads expert weights to 128 x 256, which adds 9 % to gpt-oss's 2880 x 2880; Triton
        # pads to 64.
        notes.append("MXFP4 experts are padded as vLLM's kernel for the card requires")
        margin = UNKNOWN_MARGIN
    stored_in = storage_format(values)
    if stored_in is not None and stored_in.flag is None:
        notes.append(f"{NOT_TRAINABLE}, because the model is stored in {stored_in.name}")
    if is_multimodal(values):
        notes.append(
            f"{NOT_TRAINABLE}, because the model is multimodal; only the language model is counted"
        )
    if family is None:
        shape = _unknown_shape(fields, stored, model_type, architectures)
        notes.append(
            f"unknown architecture {model_type!r}: sizes come from the safetensors headers"
        )
        margin = UNKNOWN_MARGIN
    else:
        shape = family(fields)
        notes += _parameter_count_notes(shape, stored, quantization)
    return ModelSpec(
        name=name,
        architecture=architectures[0] if architectures else model_type,
        family=model_type if family else "unknown",
        hidden_size=shape.hidden,
        vocab_size=shape.vocab,
        heads=shape.heads,
        head_dim=shape.head_dim,
        max_position=shape.max_position,
        dtype=_dtype(fields),
        tied=shape.tied,
        blocks=shape.blocks,
        final_vectors=shape.final_vectors,
        extra_parameters=shape.extra_parameters,
        head_bias=shape.head_bias,
        quantization=quantization if isinstance(quantization, Quantization) else None,
        stored_weights=stored,
        sized_by_headers=isinstance(quantization, str),
        margin=margin,
        lora_tables=shape.lora_tables,
        rope_tables=shape.rope_tables,
        scores=shape.scores,
        targets=default_targets(values),
        notes=(*shape.notes, *notes),
    )


def _unknown_shape(
    fields: Fields, stored: StoredWeights | None, model_type: str, architectures: tuple[str, ...]
) -> Shape:
    if stored is None:
        known_types = ", ".join(sorted(FAMILIES))
        raise UnsupportedError(
            f"architecture {model_type or (architectures or ('unnamed',))[0]!r} is not known "
            "to the sizer, and there are no safetensors headers to size it from",
            where=fields.where,
            fix="use a folder that also contains the safetensors files, or a model of one of these "
            f"types: {known_types}",
        )
    text_config = fields.section("text_config")
    return shape_from_headers(text_config or fields, stored)


def _dtype(fields: Fields) -> str:
    text_config = fields.section("text_config")
    dtype = fields.text("dtype") or fields.text("torch_dtype")
    if dtype is None and text_config is not None:
        dtype = text_config.text("dtype") or text_config.text("torch_dtype")
    name = (dtype or "float32").removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise InputError(f"unknown dtype {name!r}", where=fields.where)
    return name


def _parameter_count_notes(
    shape: Shape, stored: StoredWeights | None, quantization: object
) -> list[str]:
    """Return a note if the safetensors headers of unquantized weights contain a different number of
    parameters than config.json describes. Otherwise return no note.
    """
    if stored is None or quantization is not None:
        return []
    spec = ModelSpec(
        name="",
        architecture="",
        family="",
        hidden_size=shape.hidden,
        vocab_size=shape.vocab,
        heads=shape.heads,
        head_dim=shape.head_dim,
        max_position=shape.max_position,
        dtype="bfloat16",
        tied=shape.tied,
        blocks=shape.blocks,
        final_vectors=shape.final_vectors,
        extra_parameters=shape.extra_parameters,
        head_bias=shape.head_bias,
    )
    duplicate_head = shape.vocab * shape.hidden if shape.tied else 0
    if stored.elements in (spec.parameters, spec.parameters + duplicate_head):
        return []
    share = stored.elements / max(spec.parameters, 1) - 1
    return [
        f"the headers have {stored.elements:,} values, but the config implies {spec.parameters:,} "
        f"({share:+.1%})"
    ]
