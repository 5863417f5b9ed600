"""The tables of keys: what they say is what a translation does, and what a run file can hold."""

from __future__ import annotations

from typing import Any

import pytest

from toolkit.config.importers.documents import from_document
from toolkit.config.importers.foreign import Foreign
from toolkit.config.importers.formats import TABLES, table
from toolkit.config.importers.mapping import KINDS, LEFT_OUT, REFUSED, Later, Row, Unfit
from toolkit.config.importers.shell import commands, flags
from toolkit.config.importers.translate import translate
from toolkit.config.importers.write import markdown
from toolkit.config.key_moves import key_schema

ALL = [(form, row) for form in TABLES for row in table(form).rows]


def ids(value: Any) -> str:
    return value.old if isinstance(value, Row) else str(value)


@pytest.mark.parametrize("form", TABLES)
def test_every_row_names_a_key_of_a_run_file_or_says_why_not(form: str) -> None:
    for row in table(form).rows:
        assert row.kind in KINDS
        if row.to is None:
            assert row.why, row
        elif row.to != "lora":
            parts = row.to.split(".")
            assert key_schema(tuple(parts[:2])) is not None, row
    for default in table(form).defaults:
        assert key_schema(tuple(default.to.split("."))) is not None, default


@pytest.mark.parametrize("form", TABLES)
def test_a_table_is_true(form: str) -> None:
    """Each row alone: a probe of its key goes where the row says."""
    for row in table(form).rows:
        if row.trl or row.old.endswith("*"):
            continue
        foreign = Foreign(form)
        foreign.add(row.old, _probe(row), "line 1")
        made = translate(foreign, table(form))
        assert [one.text for one in made.unread if "not a known key" in one.why] == [], row
        if row.kind == LEFT_OUT:
            assert [one.key for one in made.left_out] == [row.old], row
        elif row.kind == REFUSED:
            assert [one.key for one in made.refused] == [row.old], row
        elif row.convert is None:
            key = row.to or ""
            weighed = key == "grpo.reward_weights"
            assert key in made.written or weighed, row
            assert made.written[key].value == _probe(row) or "replaces" in str(made.notes), row


def _probe(row: Row) -> Any:
    return {"never": "so"} if row.refused else 3


@pytest.mark.parametrize("form", TABLES)
def test_the_migration_table_has_every_key(form: str) -> None:
    text = markdown(form)
    lines = text.splitlines()
    assert lines[2] == "| key of the other tool | key of the run file | what happens | why |"
    assert len(lines) == 4 + len(table(form).rows)
    for row, line in zip(table(form).rows, lines[4:], strict=True):
        assert f"`{row.old}`" in line
        assert f"| {row.kind} |" in line


def test_conversions_refuse_with_a_reason() -> None:
    reasons: set[str] = set()
    for _, row in ALL:
        if row.convert is None:
            continue
        for value in (None, -1, 0, 4, 0.5, "zz", "a.b", [], ["all-linear"], ["a", "b"], True, {}):
            try:
                row.convert(value)
            except Unfit as reason:
                reasons.add(str(reason))
            except Later:
                break
    assert len(reasons) >= 6
    assert "" not in reasons


def test_flags_of_a_command_line() -> None:
    text = 'X=3\nrun --a-b 1 --c=x --d --e 1 2 \\\n --f \'{"k": [1]}\' --g "$X/$Y" --h -1 # --i 2\n'
    (words,) = list(commands(text))
    found = {name: value for name, value, _ in flags(words)}
    assert found.pop("g").text == "3/$Y"
    assert found == {"a_b": 1, "c": "x", "d": True, "e": [1, 2], "f": {"k": [1]}, "h": -1}


@pytest.mark.parametrize(
    "text",
    ["'", '"', "\\", "$", "${", "$(", "`", "a='b", "--", "=", "\x00", "a=1 b", "#", "{" * 5000],
)
def test_no_shell_text_is_too_odd(text: str) -> None:
    for words in commands(text * 3):
        list(flags(words))


def test_booleans_of_yaml_1_1_are_booleans() -> None:
    from pathlib import Path

    from toolkit.config.layers import parse_source
    from toolkit.config.source import Source

    document = parse_source(
        Source("x.yaml", "base_model: m\nload_in_4bit: yes\ntf32: off\n", Path())
    )
    made = translate(from_document(document, table("axolotl")), table("axolotl"))
    assert (made.get("model.load_in_4bit"), made.get("grpo.tf32")) == (True, False)
