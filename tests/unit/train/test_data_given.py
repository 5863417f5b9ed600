"""Data files as users have them: compressed, with nulls, with chats as JSON text, with unusual
column names.
"""

from __future__ import annotations

import gzip
import json
import os
import time
from typing import TYPE_CHECKING, Any

import datasets
import pyarrow as pa
import pytest
from data_helpers import make_tokenizer, user
from pyarrow import parquet

from toolkit.base.errors import ConfigError, InputError
from toolkit.config.data_facts import _read
from toolkit.config.data_scan import DataSelection
from toolkit.config.run_config import DatasetSection
from toolkit.train.data.dataset import load_data
from toolkit.train.data.row_reader import read_data_file
from toolkit.train.rewards.builtin import ExactMatch, NumericMatch
from toolkit.train.rewards.error_policy import ErrorPolicy, guard

if TYPE_CHECKING:
    from pathlib import Path


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def load(path: Path, *, chat: bool = False, limit: int | None = None, **section: Any) -> Any:
    chosen = DatasetSection(path=str(path), **{"prompt": "q", "answer": "a", **section})
    return load_data(chosen, make_tokenizer(chat=chat), max_prompt_length=limit)


def validation_problem(path: Path) -> str | None:
    """Return the problem that ``toolkit validate`` reports for a data file, or None."""
    _read.cache_clear()
    return _read(path, DataSelection("q", "a"), "train", (0, 0)).problem


# --- compressed files


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".json.gz", ".csv.gz"])
def test_gzip_is_read(tmp_path: Path, suffix: str) -> None:
    content = {".jsonl.gz": b'{"q": "w1", "a": "1"}\n', ".json.gz": b'[{"q": "w1", "a": "1"}]'}
    path = tmp_path / f"d{suffix}"
    path.write_bytes(gzip.compress(content.get(suffix, b"q,a\nw1,1\n")))
    assert load(path).train.to_list() == [{"q": "w1", "a": "1", "prompt": "w1", "answer": "1"}]
    assert validation_problem(path) is None


@pytest.mark.parametrize(
    ("suffix", "tool"), [(".zst", "zstd -d"), (".xz", "unxz"), (".bz2", "bun")]
)
def test_other_compression_formats_are_refused(tmp_path: Path, suffix: str, tool: str) -> None:
    path = tmp_path / f"d.jsonl{suffix}"
    path.write_bytes(b"x")
    with pytest.raises(ConfigError, match=f"not a supported type of data file[\\s\\S]*{tool}"):
        read_data_file(path)
    assert "is not a supported type of data file" in str(validation_problem(path))


@pytest.mark.parametrize(
    ("byte", "message"),
    [(b"\n", "lines are blank"), (b"0", "unpacks to")],
)
def test_a_gzip_bomb_is_refused_quickly(tmp_path: Path, byte: bytes, message: str) -> None:
    path = tmp_path / "d.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=6) as file:
        for _ in range(20):
            file.write(byte * (1 << 23))
    begin = time.process_time()
    with pytest.raises(InputError, match=message):
        read_data_file(path)
    assert time.process_time() - begin < 5


def test_a_truncated_gzip_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(gzip.compress(lines([{"q": "w1", "a": 1}]))[:-6])
    with pytest.raises(InputError, match="cannot be unpacked"):
        read_data_file(path)
    assert "cannot be unpacked" in str(validation_problem(path))


# --- invalid text, and column names


@pytest.mark.parametrize("row", ['{"\\ud800": 1}', '{"q": {"\\ud800": 1}}', '{"q": ["\\ud800"]}'])
def test_a_lone_surrogate_is_reported(tmp_path: Path, row: str) -> None:
    (tmp_path / "d.jsonl").write_text(f'{{"q": {{}}}}\n{row}\n')
    with pytest.raises(InputError, match="half of a character") as caught:
        read_data_file(tmp_path / "d.jsonl")
    assert caught.value.where == f"{tmp_path}/d.jsonl:2"
    assert "half of a character" in str(validation_problem(tmp_path / "d.jsonl"))


def test_parquet_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    raw = pa.array([b"w1", b"\xff\xfe"])
    broken = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    parquet.write_table(pa.table({"q": broken}), tmp_path / "d.parquet")
    with pytest.raises(InputError, match=r"cannot be read: .*UTF8") as caught:
        read_data_file(tmp_path / "d.parquet")
    assert caught.value.exit_code == 2


def test_parquet_with_duplicate_columns_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["q", "q"])
    parquet.write_table(table, tmp_path / "d.parquet")
    with pytest.raises(InputError, match="two columns have the same name, 'q'"):
        read_data_file(tmp_path / "d.parquet")
    assert validation_problem(tmp_path / "d.parquet") == "two columns have the same name, 'q'"


def test_parquet_with_a_map(tmp_path: Path) -> None:
    pairs = pa.array([[("k", 1), ("l", 2)], None], type=pa.map_(pa.string(), pa.int64()))
    parquet.write_table(
        pa.table({"q": ["w1", "w2"], "a": [1, 2], "m": pairs}), tmp_path / "d.parquet"
    )
    rows = load(tmp_path / "d.parquet").train.to_list()
    assert rows[0]["m"] == [{"key": "k", "value": 1}, {"key": "l", "value": 2}]
    assert rows[1]["m"] is None


def test_too_many_columns_are_refused(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(lines([{f"c{i}": 1} for i in range(3000)]))
    begin = time.monotonic()
    with pytest.raises(InputError, match="has more than 2000 columns"):
        read_data_file(tmp_path / "d.jsonl")
    assert time.monotonic() - begin < 5
    assert validation_problem(tmp_path / "d.jsonl") == "has more than 2000 columns"


@pytest.mark.parametrize("name", ["self", "class", "lambda", "None", "my column", "x-y"])
def test_a_column_of_any_name_reaches_a_reward(tmp_path: Path, name: str) -> None:
    (tmp_path / "d.jsonl").write_bytes(lines([{"q": "w1", "a": "1", name: "given"}]))
    (row,) = load(tmp_path / "d.jsonl").train.to_list()
    got: dict[str, Any] = {}

    def mine(**columns: Any) -> list[float]:
        got.update(columns)
        return [1.0]

    kept = {key: [value] for key, value in row.items() if key != "prompt"}
    guarded = guard("mine", mine, ErrorPolicy())
    assert guarded(prompts=["w1"], completions=["1"], completion_ids=[[1]], **kept) == [1.0]
    assert got[name] == ["given"]
    assert guard("exact", ExactMatch(), ErrorPolicy())(
        prompts=["w1"], completions=["1"], **kept
    ) == [1.0]


@pytest.mark.parametrize("name", ["image", "images", "completion", "log_extra"])
def test_a_column_with_a_name_of_the_trainer_is_left_out(tmp_path: Path, name: str) -> None:
    (tmp_path / "d.jsonl").write_bytes(lines([{"q": "w1", "a": "1", name: "given"}]))
    data = load(tmp_path / "d.jsonl")
    assert data.train.column_names == ["q", "a", "prompt", "answer"]
    assert f"the column {name!r} is left out: " in data.report.train.lines()[1]


def test_a_prompt_column_with_a_name_of_the_trainer_is_used(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(lines([{"images": "w1", "a": "1"}]))
    data = load(tmp_path / "d.jsonl", prompt="images")
    assert data.train.to_list() == [{"a": "1", "prompt": "w1", "answer": "1"}]
    assert data.report.train.notes == ()


# --- missing answers


def test_null_answers_are_counted_and_never_compared(tmp_path: Path) -> None:
    rows = [{"q": "w1", "a": "1"}, {"q": "w2", "a": None}, {"q": "w3"}]
    (tmp_path / "d.jsonl").write_bytes(lines(rows))
    data = load(tmp_path / "d.jsonl")
    assert data.report.train.no_answer == 2
    assert data.report.train.lines()[1] == (
        "2 of 3 rows have no answer (null): rewards that compare with the answer do not score them"
    )
    answers = data.train["answer"][:]
    for reward in (ExactMatch(), NumericMatch()):
        assert reward(prompts=[""] * 3, completions=["None"] * 3, answer=answers)[1:] == [
            None,
            None,
        ]


def test_nan_counts_as_a_missing_answer(tmp_path: Path) -> None:
    table = pa.table({"q": ["w1", "w2"], "a": [1.0, float("nan")]})
    parquet.write_table(table, tmp_path / "d.parquet")
    data = load(tmp_path / "d.parquet")
    assert data.train["answer"][:] == [1.0, None]
    assert data.report.train.no_answer == 1


def test_a_dataset_without_any_answer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(lines([{"q": "w1", "a": None}]))
    with pytest.raises(ConfigError, match="column 'a' has no answers: all 1 values are null"):
        load(tmp_path / "d.jsonl")


# --- chats


def test_chats_in_json_text_are_read(tmp_path: Path) -> None:
    chats = [[user("w1")], [user("w2"), {"role": "system", "content": "w3"}]]
    (tmp_path / "d.jsonl").write_bytes(lines([{"q": json.dumps(chat), "a": 1} for chat in chats]))
    data = load(tmp_path / "d.jsonl", chat=True)
    assert data.report.train.chat
    assert [row["prompt"] for row in data.train] == chats
    assert "they were read as chats" in data.report.train.lines()[1]


def test_a_mix_of_texts_and_json_chats_is_reported(tmp_path: Path) -> None:
    texts = [json.dumps([user("w1")]), "w2"]
    (tmp_path / "d.jsonl").write_bytes(lines([{"q": text, "a": 1} for text in texts]))
    data = load(tmp_path / "d.jsonl")
    assert data.train["prompt"][:] == texts
    assert "1 of 2 prompts are chats written as JSON text" in data.report.train.lines()[1]


def test_nulls_that_arrow_adds_are_removed_from_chats(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    chats = [
        [user("w1")],
        [user("w2"), {"role": "assistant", "content": None, "tool_calls": [call]},
         {"role": "tool", "content": "w3", "name": "f"}],
    ]  # fmt: skip
    (tmp_path / "d.jsonl").write_bytes(lines([{"q": chat, "a": 1} for chat in chats]))
    data = load(tmp_path / "d.jsonl", chat=True)
    assert [row["prompt"] for row in data.train] == chats
    assert data.train[1]["prompt"] == chats[1]
    assert data.train["prompt"][0] == chats[0]
    assert data.train.select([1])[0]["prompt"] == chats[1]


# --- long prompts


@pytest.mark.parametrize("chat", [False, True])
def test_a_prompt_of_megabytes_is_shortened_before_tokenizing(tmp_path: Path, chat: bool) -> None:
    text = "w1 " * (5 << 20) + "w2 w3"
    (tmp_path / "d.jsonl").write_bytes(lines([{"q": [user(text)] if chat else text, "a": 1}]))
    begin = time.process_time()
    data = load(tmp_path / "d.jsonl", chat=chat, limit=8)
    assert time.process_time() - begin < 5
    prompt = data.train[0]["prompt"]
    assert (prompt[0]["content"] if chat else prompt).endswith("w1 w2 w3")
    assert data.report.train.truncated == 1


def test_validate_accepts_a_file_with_one_huge_row(tmp_path: Path) -> None:
    for name in ("d.jsonl", "d.json"):
        rows = [{"q": "w" * (5 << 20), "a": 1}]
        (tmp_path / name).write_text(json.dumps(rows if name == "d.json" else rows[0]))
        assert validation_problem(tmp_path / name) is None


# --- files that change during the run


@pytest.mark.parametrize("kind", ["arrow", "saved", "parquet"])
def test_no_data_file_stays_memory_mapped(tmp_path: Path, kind: str) -> None:
    rows = [{"q": f"w{i}", "a": i} for i in range(50)]
    if kind == "saved":
        path = tmp_path / "saved"
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    else:
        path = tmp_path / f"d.{kind}"
        table = pa.Table.from_pylist(rows)
        if kind == "parquet":
            parquet.write_table(table, path)
        else:
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
    data = load(path)
    for file in [path] if path.is_file() else path.glob("*.arrow"):
        os.truncate(file, 0)
    assert [row["answer"] for row in data.train] == list(range(50))
    with open("/proc/self/maps", encoding="utf-8") as maps:
        assert str(tmp_path) not in maps.read()


def test_data_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(lines([{"q": "w1", "a": 1}]))

    def read_and_change(file: Path, limit: int | None) -> Any:
        rows = read_data_file(file, limit)
        file.write_bytes(lines([{"q": "w1", "a": 1}, {"q": "w2", "a": 2}]))
        return rows

    monkeypatch.setattr("toolkit.train.data.dataset_source.read_data_file", read_and_change)
    with pytest.raises(InputError, match="the data changed while it was read"):
        load(path)
