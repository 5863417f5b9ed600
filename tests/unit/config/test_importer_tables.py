"""The tables of keys for importing configs of other tools: a translation does what a row says, and
the keys of a run file in the tables exist.
"""

from __future__ import annotations

from typing import Any

import pytest

from toolkit.config.importers.documents import from_document
from toolkit.config.importers.foreign import ForeignConfig
from toolkit.config.importers.formats import TABLE_MODULES, load_table
from toolkit.config.importers.mapping import (
    KINDS,
    LEFT_OUT,
    REFUSED,
    ConvertedLater,
    Row,
    UnsupportedValue,
)
from toolkit.config.importers.shell import parse_options, split_commands
from toolkit.config.importers.translate import translate
from toolkit.config.importers.write import table_markdown
from toolkit.config.key_moves import key_schema

ALL_ROWS = [
    (format_name, row) for format_name in TABLE_MODULES for row in load_table(format_name).rows
]


def ids(value: Any) -> str:
    return value.foreign_key if isinstance(value, Row) else str(value)


@pytest.mark.parametrize("format_name", TABLE_MODULES)
def test_every_row_names_a_key_of_a_run_file_or_says_why_not(format_name: str) -> None:
    for row in load_table(format_name).rows:
        assert row.kind in KINDS
        if row.run_key is None:
            assert row.why, row
        elif row.run_key != "lora":
            parts = row.run_key.split(".")
            assert key_schema(tuple(parts[:2])) is not None, row
    for default in load_table(format_name).defaults:
        assert key_schema(tuple(default.run_key.split("."))) is not None, default


@pytest.mark.parametrize("format_name", TABLE_MODULES)
def test_each_row_converts_its_key_as_it_says(format_name: str) -> None:
    """A config with only the key of one row is translated as the row says."""
    for row in load_table(format_name).rows:
        if row.migrated_key or row.foreign_key.endswith("*"):
            continue
        foreign = ForeignConfig(format_name)
        foreign.add(row.foreign_key, _probe(row), "line 1")
        made = translate(foreign, load_table(format_name))
        assert [one.text for one in made.unread if "not a known key" in one.why] == [], row
        if row.kind == LEFT_OUT:
            assert [one.key for one in made.left_out] == [row.foreign_key], row
        elif row.kind == REFUSED:
            assert [one.key for one in made.refused] == [row.foreign_key], row
        elif row.convert is None:
            key = row.run_key or ""
            weighed = key == "grpo.reward_weights"
            assert key in made.run_values or weighed, row
            assert made.run_values[key].value == _probe(row) or "replaces" in str(made.notes), row


def _probe(row: Row) -> Any:
    return {"never": "so"} if row.refused else 3


@pytest.mark.parametrize("format_name", TABLE_MODULES)
def test_the_markdown_table_has_every_key(format_name: str) -> None:
    text = table_markdown(format_name)
    lines = text.splitlines()
    assert lines[2] == "| key of the other tool | key of the run file | what happens | why |"
    assert len(lines) == 4 + len(load_table(format_name).rows)
    for row, line in zip(load_table(format_name).rows, lines[4:], strict=True):
        assert f"`{row.foreign_key}`" in line
        assert f"| {row.kind} |" in line


def test_conversions_refuse_with_a_reason() -> None:
    reasons: set[str] = set()
    for _, row in ALL_ROWS:
        if row.convert is None:
            continue
        for value in (None, -1, 0, 4, 0.5, "zz", "a.b", [], ["all-linear"], ["a", "b"], True, {}):
            try:
                row.convert(value)
            except UnsupportedValue as reason:
                reasons.add(str(reason))
            except ConvertedLater:
                break
    assert len(reasons) >= 6
    assert "" not in reasons


def test_flags_of_a_command_line() -> None:
    text = 'X=3\nrun --a-b 1 --c=x --d --e 1 2 \\\n --f \'{"k": [1]}\' --g "$X/$Y" --h -1 # --i 2\n'
    (words,) = list(split_commands(text))
    found = {name: value for name, value, _ in parse_options(words)}
    assert found.pop("g").text == "3/$Y"
    assert found == {"a_b": 1, "c": "x", "d": True, "e": [1, 2], "f": {"k": [1]}, "h": -1}


@pytest.mark.parametrize(
    "text",
    ["'", '"', "\\", "$", "${", "$(", "`", "a='b", "--", "=", "\x00", "a=1 b", "#", "{" * 5000],
)
def test_any_shell_text_is_split_without_an_exception(text: str) -> None:
    for words in split_commands(text * 3):
        list(parse_options(words))


def test_booleans_of_yaml_1_1_are_booleans() -> None:
    from pathlib import Path

    from toolkit.config.document_loader import parse_source
    from toolkit.config.source import Source

    document = parse_source(
        Source("x.yaml", "base_model: m\nload_in_4bit: yes\ntf32: off\n", Path())
    )
    made = translate(from_document(document, load_table("axolotl")), load_table("axolotl"))
    assert (made.get("model.load_in_4bit"), made.get("grpo.tf32")) == (True, False)
