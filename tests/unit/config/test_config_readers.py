"""YAML, JSON and TOML to nodes: the values of a trusted reader, and places that point at what
they name.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.config.layers import parse
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
    SCALARS, lambda below: st.lists(below, max_size=4) | st.dictionaries(KEYS, below, max_size=4)
)
MAPPINGS = st.dictionaries(KEYS, TREES, max_size=5)
NO_DEADLINE = settings(deadline=None, max_examples=200)


def read(text: str, form: str) -> Document:
    """A text as a document."""
    return parse(Source("run", text, Path("/"), None, form))


def spans_hold(root: Node) -> None:
    """Each scalar's span is its spelling, each key's span the key, and lines agree with offsets."""
    text = root.source.text
    for path, node in root.walk():
        start = node.mark.start
        assert node.mark.line == text.count("\n", 0, start) + 1
        assert node.mark.column == start - (text.rfind("\n", 0, start) + 1) + 1
        if node.key is not None and root.source.format != "toml":  # a dotted key has one place
            assert str(path[-1]) in text[node.key.start : node.key.end]


@NO_DEADLINE
@given(MAPPINGS, st.sampled_from([None, 2]), st.booleans())
def test_json_is_what_the_standard_library_reads(
    tree: Any, indent: int | None, ascii_only: bool
) -> None:
    text = json.dumps(tree, indent=indent, ensure_ascii=ascii_only)
    document = read(text, "json")
    assert document.findings == []
    assert document.root.to_plain() == tree
    spans_hold(document.root)
    for _, node in document.root.walk():
        assert json.loads(text[node.mark.start : node.mark.end]) == node.to_plain()


@NO_DEADLINE
@given(MAPPINGS)
def test_yaml_reads_json_alike(tree: Any) -> None:
    """YAML 1.2 is a superset of JSON; ASCII escapes aside, which libyaml reads as code units."""
    text = json.dumps(tree, ensure_ascii=False)
    if any(not character.isprintable() for character in text):
        return
    document = read(text, "yaml")
    assert document.root.to_plain() == tree
    spans_hold(document.root)


@pytest.mark.parametrize(
    "bad",
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
def test_bad_json_is_one_syntax_finding(bad: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        json.loads(bad)
    document = read(bad, "json")
    assert [found.rule for found in document.findings] == ["DOC001"]
    assert not document.whole


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


def test_toml_is_what_the_standard_library_reads_and_placed() -> None:
    document = read(TOML, "toml")
    assert document.findings == []
    expected = tomllib.loads(TOML)
    expected["model"]["when"] = "1979-05-27T07:32:00"
    assert document.root.to_plain() == expected
    spans_hold(document.root)
    placed = {
        path: TOML[node.mark.start : node.mark.end] for path, node in document.root.walk() if path
    }
    assert placed["title",] == '"x"'
    assert placed["dotted", "key", "here"] == "true"
    assert placed["model", "numbers", 1] == "2.5"
    assert placed["model", "inline", "b", "c", 0, "d"] == '"e"'
    assert placed["model", "when"] == "1979-05-27 07:32:00"
    assert placed["reward", "functions", 1, "name"] == '"second"'
    assert placed["reward", "functions", 1, "options", "pattern"] == '"a"'


@NO_DEADLINE
@given(
    st.dictionaries(KEYS, st.booleans() | st.integers(-99, 99) | st.text(max_size=8), max_size=4),
    KEYS,
)
def test_toml_scalars_are_placed(values: dict[str, Any], table: str) -> None:
    lines = [f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    text = "\n".join(lines)
    try:
        expected = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return  # JSON and TOML escapes differ for some characters
    document = read(text, "toml")
    assert document.root.to_plain() == expected
    for key, value in values.items():
        node = document.node((table, key))
        assert node is not None
        assert text[node.mark.start : node.mark.end] == json.dumps(value)


FAULTS = {
    "a: [1\n": ("DOC001", 2), "a: *b\n": ("DOC001", 1), "a:\n\tb: 1\n": ("DOC004", 2),
    "a: !t 1\n": ("DOC003", 1),
    "a: 1\n---\nb: 1\n": ("DOC005", 2), "a: .nan\n": ("DOC006", 1), "? [1]\n: 2\n": ("DOC010", 1),
    "a: 1\na: 2\n": ("DOC002", 2), "<<: {a: 1}\n": ("DOC008", 1), "a: &x [*x]\n": ("DOC009", 1),
    "a: '\x00'\n": ("DOC013", 1), "- a\n": ("DOC001", 1), "# nothing\n": ("DOC001", 1),
    "a: 'b\n": ("DOC001", 2),
}  # fmt: skip


@pytest.mark.parametrize(("text", "wanted"), FAULTS.items())
def test_what_yaml_may_not_hold(text: str, wanted: tuple[str, int]) -> None:
    (found,) = read(text, "yaml").findings
    assert (found.rule, found.mark and found.mark.line) == wanted


def test_an_alias_is_its_anchor_with_places_of_its_own() -> None:
    document = read("a: &x {k: 1}\nb: *x\nc: *x\n", "yaml")
    assert document.root.to_plain() == {"a": {"k": 1}, "b": {"k": 1}, "c": {"k": 1}}
    first, second = document.node(("a",)), document.node(("b",))
    assert first is not None
    assert second is not None
    assert first is not second
    assert second.key is not None
    assert second.key.line == 2


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
def test_depth_breadth_and_bombs_end_early(text: str, form: str) -> None:
    text = text.replace("*k0", "*a")
    document = read(text, form)
    assert [found.rule for found in document.findings] == ["DOC009"]


def test_a_bomb_of_aliases_is_told_apart() -> None:
    ten = "a: &a [" + "x, " * 10 + "]\n"
    assert read(ten + "b: [" + "*a, " * 400 + "]\n", "yaml").findings == []
    (found,) = read(ten + "b: [" + "*a, " * 500 + "]\n", "yaml").findings
    assert found.message == "aliases expand to more than 5000 values"
