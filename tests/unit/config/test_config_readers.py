"""The readers of YAML, JSON and TOML give the values that a trusted reader gives, and every node
has the position of its value in the file.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.config.document_loader import parse_source
from toolkit.config.source import Source

if TYPE_CHECKING:
    from toolkit.config.document import Document, Node

KEYS = st.text("abcdefgh_", min_size=1, max_size=6)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(-1e9, 1e9)
    | st.text(max_size=12)
)
TREES = st.recursive(
    SCALARS,
    lambda children: st.lists(children, max_size=4) | st.dictionaries(KEYS, children, max_size=4),
)
MAPPINGS = st.dictionaries(KEYS, TREES, max_size=5)
NO_DEADLINE = settings(deadline=None, max_examples=200)


def read(text: str, form: str) -> Document:
    """Parse a text as a document of a run file."""
    return parse_source(Source("run", text, Path("/"), None, form))


def assert_positions_are_correct(root: Node) -> None:
    """Each node has the line and column of its offset, and the span of a key contains the key."""
    text = root.source.text
    for path, node in root.walk():
        start = node.position.start
        assert node.position.line == text.count("\n", 0, start) + 1
        assert node.position.column == start - (text.rfind("\n", 0, start) + 1) + 1
        # In TOML the parts of a dotted key have the same position.
        if node.key_position is not None and root.source.format != "toml":
            assert str(path[-1]) in text[node.key_position.start : node.key_position.end]


@NO_DEADLINE
@given(MAPPINGS, st.sampled_from([None, 2]), st.booleans())
def test_json_values_equal_those_of_the_standard_library(
    tree: Any, indent: int | None, ascii_only: bool
) -> None:
    text = json.dumps(tree, indent=indent, ensure_ascii=ascii_only)
    document = read(text, "json")
    assert document.findings == []
    assert document.root.to_plain() == tree
    assert_positions_are_correct(document.root)
    for _, node in document.root.walk():
        assert json.loads(text[node.position.start : node.position.end]) == node.to_plain()


@NO_DEADLINE
@given(MAPPINGS)
def test_the_yaml_reader_reads_json(tree: Any) -> None:
    """YAML 1.2 is a superset of JSON. ASCII escapes are left out, because libyaml reads them as
    code units.
    """
    text = json.dumps(tree, ensure_ascii=False)
    if any(not character.isprintable() for character in text):
        return
    document = read(text, "yaml")
    assert document.root.to_plain() == tree
    assert_positions_are_correct(document.root)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"a" 1}',
        '{"a": 1,}',
        "[1 2]",
        '{"a": 01}',
        '{"a": tru}',
        '{"a": "\n"}',
        "{} {}",
        "{'a': 1}",
    ],
)
def test_bad_json_is_one_syntax_finding(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        json.loads(text)
    document = read(text, "json")
    assert [finding.rule for finding in document.findings] == ["DOC001"]
    assert not document.is_complete


TOML = '''\
# a comment
title = "x"
"quoted key" = 1
dotted.key.here = true

[model]   # a table
model_name = 'literal \\ text'
long = """
two
lines"""
numbers = [ 1, 2.5,
  -3 ] # after
when = 1979-05-27 07:32:00
inline = { a = 1, b.c = [ { d = "e" } ] }

[[reward.functions]]
name = "first"
[[reward.functions]]
name = "second"
[reward.functions.options]
pattern = "a"
'''


def test_toml_values_equal_those_of_the_standard_library() -> None:
    document = read(TOML, "toml")
    assert document.findings == []
    expected = tomllib.loads(TOML)
    expected["model"]["when"] = "1979-05-27T07:32:00"
    assert document.root.to_plain() == expected
    assert_positions_are_correct(document.root)
    source_texts = {
        path: TOML[node.position.start : node.position.end]
        for path, node in document.root.walk()
        if path
    }
    assert source_texts["title",] == '"x"'
    assert source_texts["dotted", "key", "here"] == "true"
    assert source_texts["model", "numbers", 1] == "2.5"
    assert source_texts["model", "inline", "b", "c", 0, "d"] == '"e"'
    assert source_texts["model", "when"] == "1979-05-27 07:32:00"
    assert source_texts["reward", "functions", 1, "name"] == '"second"'
    assert source_texts["reward", "functions", 1, "options", "pattern"] == '"a"'


@NO_DEADLINE
@given(
    st.dictionaries(KEYS, st.booleans() | st.integers(-99, 99) | st.text(max_size=8), max_size=4),
    KEYS,
)
def test_toml_scalars_have_positions(values: dict[str, Any], table: str) -> None:
    lines = [f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    text = "\n".join(lines)
    try:
        expected = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return  # some JSON escapes are not TOML escapes
    document = read(text, "toml")
    assert document.root.to_plain() == expected
    for key, value in values.items():
        node = document.find_node((table, key))
        assert node is not None
        assert text[node.position.start : node.position.end] == json.dumps(value)


FAULTS = {
    "a: [1\n": ("DOC001", 2), "a: *b\n": ("DOC001", 1), "a:\n\tb: 1\n": ("DOC004", 2),
    "a: !t 1\n": ("DOC003", 1),
    "a: 1\n---\nb: 1\n": ("DOC005", 2), "a: .nan\n": ("DOC006", 1), "? [1]\n: 2\n": ("DOC010", 1),
    "a: 1\na: 2\n": ("DOC002", 2), "<<: {a: 1}\n": ("DOC008", 1), "a: &x [*x]\n": ("DOC009", 1),
    "a: '\x00'\n": ("DOC013", 1), "- a\n": ("DOC001", 1), "# nothing\n": ("DOC001", 1),
    "a: 'b\n": ("DOC001", 2),
}  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), FAULTS.items())
def test_invalid_yaml_is_a_finding(text: str, expected: tuple[str, int]) -> None:
    (finding,) = read(text, "yaml").findings
    assert (finding.rule, finding.position and finding.position.line) == expected


def test_an_alias_has_the_value_of_its_anchor_and_its_own_position() -> None:
    document = read("a: &x {k: 1}\nb: *x\nc: *x\n", "yaml")
    assert document.root.to_plain() == {"a": {"k": 1}, "b": {"k": 1}, "c": {"k": 1}}
    first, second = document.find_node(("a",)), document.find_node(("b",))
    assert first is not None
    assert second is not None
    assert first is not second
    assert second.key_position is not None
    assert second.key_position.line == 2


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("[" * 200_000, "yaml"),
        ("- " * 200_000, "yaml"),
        ("{a: " * 100_000, "yaml"),
        ("[" * 200_000, "json"),
        ('{"a":' * 100_000, "json"),
        ("a = " + "[" * 200_000, "toml"),
        ("a." * 200_000 + "b = 1", "toml"),
        ("a: [" + "x, " * 200_000 + "]", "yaml"),
        (
            "a: &a [x]\n"
            + "".join(f"k{n}: &k{n} [{', '.join([f'*k{n - 1}'] * 9)}]\n" for n in range(1, 9)),
            "yaml",
        ),
    ],
    ids=lambda value: value[:8],
)
def test_too_deep_and_too_large_documents_are_refused(text: str, form: str) -> None:
    text = text.replace("*k0", "*a")
    document = read(text, form)
    assert [finding.rule for finding in document.findings] == ["DOC009"]


def test_only_too_many_values_from_aliases_are_refused() -> None:
    ten_values = "a: &a [" + "x, " * 10 + "]\n"
    assert read(ten_values + "b: [" + "*a, " * 400 + "]\n", "yaml").findings == []
    (finding,) = read(ten_values + "b: [" + "*a, " * 500 + "]\n", "yaml").findings
    assert finding.message == "aliases expand to more than 5000 values"
