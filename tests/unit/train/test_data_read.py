"""Data files of every format, valid and damaged: values keep their types, errors name the line."""

from __future__ import annotations

import io
import json
import tarfile
from typing import TYPE_CHECKING

import pyarrow as pa
import pytest
from pyarrow import parquet

from toolkit.base.archives import ARCHIVE_SUFFIXES
from toolkit.base.errors import ConfigError, InputError
from toolkit.config.run_paths import is_path_only
from toolkit.train.data.row_reader import READERS, read_data_file

if TYPE_CHECKING:
    from pathlib import Path

ROWS = [{"q": "one", "a": 1}, {"q": 'two, "quoted"\nline', "a": 2}, {"q": "drei", "a": 3}]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def make_data_file(folder: Path, suffix: str) -> Path:
    path = folder / f"data{suffix}"
    table = pa.Table.from_pylist(ROWS)
    if suffix in (".jsonl", ".ndjson"):
        path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    elif suffix == ".json":
        path.write_text(json.dumps(ROWS))
    elif suffix in (".csv", ".tsv"):
        mark = "," if suffix == ".csv" else "\t"
        path.write_text(
            mark.join("qa") + f'\none{mark}1\n"two, ""quoted""\nline"{mark}2\ndrei{mark}3\n'
        )
    elif suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return path


@pytest.mark.parametrize("suffix", READERS)
def test_every_file_format_is_read(tmp_path: Path, suffix: str) -> None:
    rows = read_data_file(make_data_file(tmp_path, suffix))
    answers = ["1", "2", "3"] if suffix in (".csv", ".tsv") else [1, 2, 3]
    assert rows.table["q"].to_pylist() == [row["q"] for row in ROWS]
    assert rows.table["a"].to_pylist() == answers
    assert str(tmp_path / f"data{suffix}") in rows.location(2)
    assert len(read_data_file(tmp_path / f"data{suffix}", 2).table) == 2
    assert len(read_data_file(tmp_path / f"data{suffix}", 99).table) == 3


def test_the_case_of_a_suffix_is_ignored(tmp_path: Path) -> None:
    path = make_data_file(tmp_path, ".tsv").rename(tmp_path / "DATA.TSV")
    assert read_data_file(path).table.column_names == ["q", "a"]


@pytest.mark.parametrize("suffix", [*READERS, *ARCHIVE_SUFFIXES])
def test_a_path_with_a_data_suffix_is_never_a_hub_id(suffix: str) -> None:
    assert is_path_only(f"train{suffix}")
    assert is_path_only(f"TRAIN{suffix.upper()}")


def test_locations_have_line_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, "d.jsonl", '\ufeff{"a": 1}\n\n  \n{"a": 2}\r\n{"b": 3}')
    rows = read_data_file(path)
    assert [rows.location(index) for index in range(3)] == [f"{path}:1", f"{path}:4", f"{path}:5"]
    assert rows.table.to_pylist() == [{"a": 1, "b": None}, {"a": 2, "b": None}, {"a": None, "b": 3}]


def test_json_with_a_data_key(tmp_path: Path) -> None:
    path = write(tmp_path, "d.json", '{"version": 1, "data": [{"q": "x"}]}')
    assert read_data_file(path).table.to_pylist() == [{"q": "x"}]


def test_an_archive_with_one_data_file(tmp_path: Path) -> None:
    path = tmp_path / "d.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(make_data_file(tmp_path, ".arrow"), "inner/data.arrow")
    rows = read_data_file(path)
    assert rows.table.to_pylist() == ROWS
    assert rows.location(0) == f"{path}/inner/data.arrow row 1"


def test_an_archive_with_a_path_outside_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo("../../evil.jsonl")
        tar.addfile(info, io.BytesIO(b""))
    with pytest.raises(ConfigError, match="leads outside its folder") as caught:
        read_data_file(path)
    assert caught.value.where == str(path)


def test_an_error_in_an_archive_names_the_member(tmp_path: Path) -> None:
    broken = write(tmp_path, "broken.jsonl", '{"a": 1}\n{"a": "x"}')
    path = tmp_path / "d.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(broken, "inner/data.jsonl")
    with pytest.raises(ConfigError, match="column 'a'") as caught:
        read_data_file(path)
    assert caught.value.where == f"{path}/inner/data.jsonl:2"
    assert "toolkit-data-" not in str(caught.value)


def test_a_folder_in_an_archive_is_not_a_data_file(tmp_path: Path) -> None:
    (tmp_path / "data.csv").mkdir()
    path = tmp_path / "d.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(tmp_path / "data.csv", "data.csv")
    with pytest.raises(ConfigError, match="contains 0 data files"):
        read_data_file(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", '{"a": 1}\n{"a": 2', r"d.jsonl:2:8: is not JSON: Expecting ',' delimiter"),
        ("d.jsonl", '{"a": 1}\n\n[1]\n', "d.jsonl:3: .*, but this line is a list"),
        ("d.jsonl", '{"a": NaN}', "d.jsonl:1: is not JSON: NaN is not a JSON value"),
        ("d.jsonl", b'{"a": 1}\n{"a": "\xff"}', "d.jsonl:2: is not UTF-8 text"),
        ("d.jsonl", '{"a":' + "[" * 100_000, "d.jsonl:1: is nested too deeply"),
        ("d.jsonl", '{"a": "ok"}\n{"a": "\\ud800"}', "d.jsonl:2: .*half of a character"),
        ("d.json", '[{"a": 1},\n 5]', "d.json row 2: .*, but this row is a number"),
        ("d.json", '[\n{"a": 1}\n{"a": 1}]', "d.json:3: is not JSON"),
        ("d.json", '{"rows": []}', "must be a list of JSON objects"),
        ("d.json", "", "d.json:1: is not JSON"),
        ("d.csv", "a,b\n1,2\n3\n", "d.csv:3: has 1 fields, but the header has 2"),
        ("d.csv", 'a,b\n1,"2\n', "d.csv:2: unexpected end of data"),
        ("d.csv", "a,a\n1,2\n", "d.csv:1: two columns have the same name"),
        ("d.csv", b"a,b\n\xff,2\n", "d.csv: is not UTF-8 text"),
        ("d.parquet", "PAR1 not", "is not a readable Parquet file"),
        ("d.arrow", "not", "is not a readable Arrow file"),
        ("d.zip", "not", "not a readable archive"),
    ],
)
def test_the_error_for_an_invalid_file_names_the_location(
    tmp_path: Path, name: str, content, message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_data_file(write(tmp_path, name, content))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("value", ["[" * 33 + "]" * 33, '{"b":' * 33 + "1" + "}" * 33])
def test_a_deeply_nested_column_is_refused(tmp_path: Path, value: str) -> None:
    """datasets and dill fail with a RecursionError for such a column."""
    with pytest.raises(ConfigError, match="column 'a' is nested deeper than 32 levels"):
        read_data_file(write(tmp_path, "d.jsonl", f'{{"a": {value}}}'))
    less = value.removeprefix("[").removesuffix("]") if value[0] == "[" else value[5:-1]
    assert read_data_file(write(tmp_path, "e.jsonl", f'{{"a": {less}}}')).table.num_rows == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            ['"x"', "1", "2"],
            "d.jsonl:2: column 'a' has a number in this row and a text in earlier rows",
        ),
        (
            ["1", "2", '"x"'],
            "d.jsonl:3: column 'a' has a text in this row and a number in earlier rows",
        ),
        (["null", "[1]", '{"b": 1}'], "d.jsonl:3: column 'a' has an object in this row and a list"),
        (
            ["true", "1"],
            "d.jsonl:2: column 'a' has a number in this row and a boolean in earlier rows",
        ),
        (["1", str(2**70)], "d.jsonl:2: column 'a' has a number"),
    ],
)
def test_the_error_for_a_column_of_two_types_names_the_row(
    tmp_path: Path, rows: list[str], message: str
) -> None:
    content = "\n".join(f'{{"a": {value}}}' for value in rows)
    with pytest.raises(ConfigError, match=message):
        read_data_file(write(tmp_path, "d.jsonl", content))


def test_a_value_of_another_type_is_found_among_many(tmp_path: Path) -> None:
    content = "".join(
        '{"a": %s}\n' % ('"x"' if index == 7777 else index) for index in range(10_000)
    )
    with pytest.raises(ConfigError, match=r"d\.jsonl:7778: "):
        read_data_file(write(tmp_path, "d.jsonl", content))


def test_the_error_for_a_missing_file_lists_the_data_files(tmp_path: Path) -> None:
    write(tmp_path, "train.jsonl", "")
    with pytest.raises(InputError, match=r"file does not exist[\s\S]*train\.jsonl"):
        read_data_file(tmp_path / "trian.jsonl")
    with pytest.raises(
        InputError, match=r"file does not exist[\s\S]*the folder .*nowhere does not exist"
    ):
        read_data_file(tmp_path / "nowhere" / "x.jsonl")


@pytest.mark.parametrize("name", ["data.txt", "data", "data.pkl", "data.pt"])
def test_other_file_formats_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"not a supported type of data file[\s\S]*\.jsonl"):
        read_data_file(write(tmp_path, name, ""))


def test_a_huge_field_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, "d.csv", f"a,b\n{'x' * 300_000},1\n")
    assert len(read_data_file(path).table["a"][0].as_py()) == 300_000
