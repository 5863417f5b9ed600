"""ColumnType accepts the same types in a column as pyarrow, which training uses."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
from hypothesis import example, given, settings
from hypothesis import strategies as st

from toolkit.config.data_types import ColumnType, TypeMismatch

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, 2**53 + 1, 2**62, 2**63, -(2**63)]),
    st.sampled_from([0.5, 1e300]),
    st.sampled_from(["", "a"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2)
    ),
    max_leaves=5,
)


def column_type_accepts(values: list[Any]) -> bool:
    kind = ColumnType()
    try:
        for value in values:
            kind.add(value)
    except TypeMismatch:
        return False
    return True


def arrow_accepts(values: list[Any]) -> bool:
    try:
        pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError):
        return False
    return True


@given(st.lists(VALUES, max_size=4))
@example([1.5, True])
@example([True, 1.5])
@example([1, True, 1.5])
@example([{"a": 1}, {"a": "x"}])
@settings(max_examples=400, deadline=None)
@example([{"a": False}, {"a": 0.5}])
def test_a_column_accepts_the_types_that_arrow_accepts(values: list[Any]) -> None:
    if column_type_accepts(values) != arrow_accepts(values):
        # Arrow converts booleans to numbers if another list or object of the column has a float.
        # ColumnType is stricter in this case, and in no other case.
        assert not column_type_accepts(values)
        assert "False" in repr(values) or "True" in repr(values)
        assert column_type_accepts(without_booleans(values))


def without_booleans(value: Any) -> Any:
    """The same value, with each boolean replaced by a float."""
    if isinstance(value, bool):
        return float(value)
    if isinstance(value, list):
        return [without_booleans(item) for item in value]
    if isinstance(value, dict):
        return {name: without_booleans(item) for name, item in value.items()}
    return value
