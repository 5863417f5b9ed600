"""Plain scalars are read as the YAML 1.2 core schema says. PyYAML is the reference for the value in
YAML 1.1.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from toolkit.config.scalars import legacy_reading, plain_spelling, read_core, read_legacy

CORE: list[tuple[str, Any]] = [
    ("", None), ("~", None), ("null", None), ("NULL", None), ("nuLL", "nuLL"),
    ("true", True), ("False", False), ("yes", "yes"), ("no", "no"), ("on", "on"),
    ("0", 0), ("-12", -12), ("+3", 3), ("0755", 755), ("0o17", 15), ("0x1F", 31),
    ("1_024", "1_024"),
    ("5e-6", 5e-6), ("1.5e3", 1500.0), ("1.", 1.0), (".5", 0.5), ("-.5E+2", -50.0),
    ("1e400", math.inf),
    (".inf", math.inf), ("-.INF", -math.inf), ("0b11", "0b11"), ("12:30:00", "12:30:00"),
    ("2001-12-14", "2001-12-14"), ("--1", "--1"), ("1e", "1e"), (".", "."), ("+", "+"), ("٣", "٣"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), CORE)
def test_read_core_follows_the_yaml_1_2_core_schema(text: str, value: Any) -> None:
    read = read_core(text)
    assert (type(read), read) == (type(value), value)


def test_nan_is_a_float() -> None:
    assert math.isnan(read_core(".nan"))


TRAPS = {
    "5e-6": "text", "no": "the boolean false", "Y": "the boolean true",
    "0755": "the octal number 493",
    "12:30:00": "the base-60 number 45000", "1_024": "the number 1024", "0o17": "text",
    "1.5e3": "text", "0b11": "the binary number 3", "2001-12-14": "a date",
    "1:30": "the base-60 number 90",
}  # fmt: skip


@pytest.mark.parametrize(("text", "kind"), TRAPS.items())
def test_a_warning_says_what_yaml_1_1_reads(text: str, kind: str) -> None:
    assert legacy_reading(text, read_core(text)) == kind


@pytest.mark.parametrize(
    "text", ["5.0e-6", "false", "1024", "0.5", "bfloat16", "null", "0x1F", "-3", "a b"]
)
def test_scalars_that_both_versions_read_alike_give_no_warning(text: str) -> None:
    assert legacy_reading(text, read_core(text)) is None


def read_with_pyyaml(text: str) -> Any:
    """The value that PyYAML reads from a plain scalar, or the text if PyYAML reads no value."""
    try:
        tag = yaml.SafeLoader("").resolve(yaml.ScalarNode, text, (True, False))
        return yaml.SafeLoader("").construct_object(yaml.ScalarNode(tag, text))
    except (ValueError, yaml.YAMLError):
        return text


# Booleans of the YAML 1.1 type repository that PyYAML reads as text.
PYYAML_DEVIATIONS = {"y", "Y", "n", "N"}
ALPHABET = "0123456789+-._:eExob abfntrufyNY~T"


@given(
    st.text(ALPHABET, max_size=12)
    | st.from_regex(r"[-+]?[0-9_]{1,5}[.:e]?[0-9_]{0,4}", fullmatch=True)
)
def test_read_legacy_agrees_with_pyyaml(text: str) -> None:
    text = text.strip()
    # The float pattern of PyYAML wrongly matches "._" and "..".
    if text in PYYAML_DEVIATIONS or text.startswith("."):
        return
    kind, value = read_legacy(text)
    oracle = read_with_pyyaml(text)
    if kind == "a date":
        assert not isinstance(oracle, (str, int, float)) or oracle == text
    elif isinstance(oracle, float) and math.isnan(oracle):
        assert math.isnan(value)
    elif isinstance(oracle, (int, float)) and ":" in text:
        assert value == pytest.approx(oracle)
    else:
        assert (type(value), value) == (type(oracle), oracle)


@given(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
def test_plain_spelling_is_read_alike_by_all_versions(value: Any) -> None:
    """The text that a fix writes has the same value in YAML 1.2 and in YAML 1.1."""
    text = plain_spelling(value)
    if isinstance(value, str) and text.startswith('"'):
        if value.isprintable():
            assert yaml.safe_load(text) == value
        return
    assert (read_core(text), legacy_reading(text, read_core(text))) == (value, None)
    assert read_with_pyyaml(text) == value
