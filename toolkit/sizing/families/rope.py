"""Compute the size of the engine's tables of cosines and sines for rotary embeddings. Each kind of
rotary embedding in a model has one table.

A table has one row for each position that the model supports. So its size does not depend on
max_seq_length (vllm/model_executor/layers/rotary_embedding; checked by
tests/contract/test_sizing_engine.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.sizing.model_blocks import RopeTable

if TYPE_CHECKING:
    from toolkit.sizing.config_fields import Fields

MAX_FACTOR = 4096  # limit of a scaling factor; published ones are below 100
LAYER_TYPES = ("full_attention", "sliding_attention")


def rope_tables(
    fields: Fields, columns: int, max_position: int, *, local: bool = False
) -> tuple[RopeTable, ...]:
    """Return the tables of cosines and sines that the engine needs for a model.

    The settings of the rotary embeddings are under the key rope_parameters (transformers 5) or
    rope_scaling of config.json. ``local`` is true if sliding-window layers have their own unscaled
    table.
    """
    scaling = _scaling(fields)
    sections = [section for name in LAYER_TYPES if scaling and (section := scaling.section(name))]
    if sections:
        return tuple(
            RopeTable(_table_rows(section, fields, max_position), columns) for section in sections
        )
    tables = (RopeTable(_table_rows(scaling, fields, max_position), columns),)
    return (*tables, RopeTable(max_position, columns)) if local else tables


def rotary_columns(fields: Fields, head_dim: int, *, default: float = 1.0) -> int:
    """The number of columns of a table of cosines and sines. This is the number of dimensions of a
    head that are rotated.
    """
    scaling = _scaling(fields)
    rotary_share = (
        scaling.number("partial_rotary_factor", default=default, low=0, high=1)
        if scaling
        else default
    )
    return int(
        head_dim * fields.number("partial_rotary_factor", default=rotary_share, low=0, high=1)
    )


def _scaling(fields: Fields) -> Fields | None:
    return fields.section("rope_parameters") or fields.section("rope_scaling")


def _table_rows(scaling: Fields | None, fields: Fields, max_position: int) -> int:
    if scaling is None:
        return max_position
    kind = scaling.text("rope_type") or scaling.text("type") or "default"
    factor = scaling.number("factor", default=1.0, low=0, high=MAX_FACTOR)
    key = "original_max_position_embeddings"
    original = scaling.integer(key, default=fields.integer(key, default=max_position))
    if kind == "linear":
        return int(max_position * factor)
    if kind in ("yarn", "deepseek_yarn"):
        return int(original * factor)
    # LongRoPE stores the short table before the long one.
    return original + max_position if kind == "longrope" else max_position
