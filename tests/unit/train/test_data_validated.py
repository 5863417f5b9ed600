"""``toolkit validate`` and training refuse the same data files, with the same message."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from toolkit.base.errors import ToolkitError
from toolkit.config.data_facts import DataFacts, read_data_facts
from toolkit.config.document_loader import parse_source
from toolkit.config.source import Source
from toolkit.train.data.data_checks import parse_prompts
from toolkit.train.data.prompt_format import check_prompts
from toolkit.train.data.row_reader import read_data_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TABLE = pa.table({"prompt": [f"{i}+1=" for i in range(3000)], "n": list(range(3000))})
DEEP = pa.table({
    "prompt": [[{"role": "user", "content": str(i)}] for i in range(50)],
    "tags": [["a"] * (i % 3) for i in range(50)],
    "none": [None] * 50,
    "d": pa.array([{"x": 1.5, "y": {"z": "t"}}] * 50),
})  # fmt: skip


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def chat(*messages: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in messages]


def parquet_without_row_groups() -> bytes:
    """Return a Parquet file without a row group. It consists of the magic number, the footer, the
    length of the footer, and again the magic number.
    """
    sink = io.BytesIO()
    with parquet.ParquetWriter(sink, pa.schema({"prompt": pa.string()})):
        pass
    return sink.getvalue()


def parquet_bytes(made: pa.Table = TABLE, **options: Any) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(made, sink, **options)
    return sink.getvalue()


def arrow_bytes(made: pa.Table = TABLE, *, stream: bool = False) -> bytes:
    sink = io.BytesIO()
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with new(sink, made.schema) as writer:
        writer.write_table(made, max_chunksize=500)
    return sink.getvalue()


def zip_bytes(**members: bytes) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        for name, data in members.items():
            archive.writestr(name.replace("_", "."), data)
    return sink.getvalue()


def tar_bytes(mode: str = "w", kind: bytes = tarfile.REGTYPE, **members: bytes) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name.replace("_", "."))
            info.size, info.type, info.linkname = len(data), kind, "/etc/passwd"
            archive.addfile(info, io.BytesIO(data))
    return sink.getvalue()


ROW = lines({"prompt": "a"})


def with_junk(*, at_footer: bool = False) -> bytes:
    """Return a Parquet file with invalid bytes in its first page, or in its footer."""
    data = bytearray(parquet_bytes())
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little") if at_footer else 4
    data[start : start + 12] = b"\xff" * 12
    return bytes(data)


def large_row_bytes() -> bytes:
    return ROW + bytes(66 << 20)


# file name, content, text that both messages contain
BAD: list[tuple[str, Callable[[], bytes], str]] = [
    ("bool.jsonl", lambda: lines({"prompt": True}), "or a list of messages, not bool"),
    ("int.json", lambda: json.dumps([{"prompt": 1}]).encode(), "or a list of messages, not int"),
    ("mixed.jsonl", lambda: lines({"prompt": "a", "x": 1}, {"prompt": "b", "x": "1"}),
     "column 'x' has a text in this row and a number in earlier rows"),
    ("inner.jsonl", lambda: lines({"prompt": "a", "x": [1]}, {"prompt": "b", "x": ["1"]}),
     "column 'x' has a list in this row, and a column can have only one type"),
    ("both.jsonl", lambda: lines({"prompt": "a"}, {"prompt": chat(("user", "b"))}),
     "column 'prompt' has a list in this row and a text in earlier rows"),
    ("role.jsonl", lambda: lines({"prompt": chat(("boss", "a"))}), "has the role 'boss', not one"),
    ("said.jsonl", lambda: lines({"prompt": chat(("user", "a"), ("assistant", "b"))}),
     "ends with an assistant message"),
    ("texts.jsonl", lambda: lines({"prompt": json.dumps(chat(("boss", "a")))}),
     "has the role 'boss', not one"),
    ("twice.jsonl", lambda: b'{"prompt": "a", "prompt": "b"}\n', "has the key 'prompt' twice"),
    ("inside.json", lambda: b'[{"prompt": "a", "x": {"k": 1, "k": 2}}]', "the key 'k' twice"),
    ("nul.jsonl", lambda: lines({"prompt": "a", "x": [{"k\0": 1}]}), "contains a NUL character"),
    ("nul.json", lambda: json.dumps([{"prompt": "a", "x": {"": {"\0": 1}}}]).encode(),
     "contains a NUL character"),
    ("open.csv", lambda: b'prompt,n\n"a,1\nb,2\n', "unexpected end of data"),
    ("bomb.jsonl.gz", lambda: gzip.compress(large_row_bytes(), 1), "unpacks to more than 64.0 MiB"),
    ("cut.jsonl.gz", lambda: gzip.compress(ROW * 50)[:40], "cannot be unpacked"),
    ("bool.parquet", lambda: parquet_bytes(pa.table({"prompt": [True, None]})),
     "of messages, not bool"),
    ("int.parquet", lambda: parquet_bytes(pa.table({"prompt": [1, 2]})),
     "or a list of messages, not int"),
    ("cut.parquet", lambda: parquet_bytes()[:-100], "is not a readable Parquet file"),
    ("short.parquet", lambda: b"PAR1", "is not a readable Parquet file"),
    ("long.parquet", lambda: parquet_bytes()[-200:], "is not a readable Parquet file"),
    ("holed.parquet", with_junk, "is not a readable Parquet file"),
    ("foot.parquet", lambda: with_junk(at_footer=True), "is not a readable Parquet file"),
    ("text.arrow", lambda: ROW, "is not a readable Arrow file"),
    ("empty.arrow", lambda: b"", "is not a readable Arrow file"),
    ("cut.arrow", lambda: arrow_bytes()[:-2000], "is not a readable Arrow file"),
    ("cut_stream.arrow", lambda: arrow_bytes(stream=True)[:-3000], "is not a readable Arrow file"),
    ("two.zip", lambda: zip_bytes(a_jsonl=ROW, b_jsonl=ROW),
     "contains 2 data files instead of one"),
    ("none.tar", lambda: tar_bytes(a_txt=ROW), "contains 0 data files instead of one"),
    ("link.tar.gz", lambda: tar_bytes("w:gz", tarfile.SYMTYPE, a_jsonl=b""), "a link or a device"),
    ("text.zip", lambda: ROW, "not a readable archive"),
    ("cut.tgz", lambda: tar_bytes("w:gz", a_jsonl=ROW * 99)[:60], "cannot be unpacked"),
    ("bomb.tgz", lambda: tar_bytes("w:gz", a_jsonl=large_row_bytes()), "unpacks to more than"),
]  # fmt: skip
GOOD: list[tuple[str, Callable[[], bytes]]] = [
    ("long.csv", lambda: b"prompt,n\n" + b"a" * 300_000 + b",1\n"),
    ("floats.jsonl", lambda: lines({"prompt": "a", "x": 1}, {"prompt": "b", "x": 1.5, "y": None})),
    ("objects.jsonl", lambda: lines({"prompt": "a", "x": {"p": 1}}, {"prompt": "b", "x": {}})),
    ("chats.jsonl", lambda: lines({"prompt": chat(("user", "a"))}, {"prompt": None})),
    ("some.jsonl", lambda: lines({"prompt": json.dumps(chat(("boss", "a")))}, {"prompt": "b"})),
    ("large.jsonl.gz", lambda: gzip.compress(lines({"prompt": "a" * 20_000}) * 300)),
    ("t.parquet", parquet_bytes),
    (
        "plain.parquet",
        lambda: parquet_bytes(compression="none", use_dictionary=False, row_group_size=99),
    ),
    (
        "v2.parquet",
        lambda: parquet_bytes(data_page_version="2.0", compression="zstd", data_page_size=512),
    ),
    ("deep.parquet", lambda: parquet_bytes(DEEP)),
    ("no_rows.parquet", lambda: parquet_bytes(TABLE.slice(0, 0))),
    # Arrow does not read the magic number at the beginning of the file.
    ("no_beginning.parquet", lambda: parquet_without_row_groups()[4:]),
    ("f.arrow", arrow_bytes),
    ("s.arrow", lambda: arrow_bytes(stream=True)),
    ("deep.arrow", lambda: arrow_bytes(DEEP)),
    ("a.zip", lambda: zip_bytes(a_jsonl=ROW, notes_txt=b"x")),
    ("a.tar.gz", lambda: tar_bytes("w:gz", a_csv=b"prompt\na\n")),
    ("a.tar.xz", lambda: tar_bytes("w:xz", a_jsonl=ROW)),
]


def validate_data(path: Path, more: str = "") -> DataFacts:
    text = f"dataset: {{path: {path.name}, prompt: prompt{more}}}"
    found = read_data_facts(
        parse_source(Source("run.yaml", text, path.parent, path.parent / "run.yaml")), "path"
    )
    assert found is not None
    return found


def training_problem(path: Path, limit: int | None = None) -> str | None:
    """Return the message with which training refuses the data, or None."""
    try:
        rows = read_data_file(path, limit)
        found, _ = parse_prompts(rows.table["prompt"].to_pylist())
        check_prompts(found, "prompt", rows.location)
    except ToolkitError as error:
        return error.message
    return None


@pytest.mark.parametrize(("name", "make", "text"), BAD, ids=[case[0] for case in BAD])
def test_validation_and_training_refuse_the_file(
    tmp_path: Path, name: str, make: Callable[[], bytes], text: str
) -> None:
    path = tmp_path / name
    path.write_bytes(make())
    facts = validate_data(path)
    problem = facts.problem or facts.refused_row
    assert problem is not None
    assert text in problem
    refusal = training_problem(path)
    assert refusal is not None
    assert text in refusal


@pytest.mark.parametrize(("name", "make"), GOOD, ids=[case[0] for case in GOOD])
def test_validation_and_training_accept_the_file(
    tmp_path: Path, name: str, make: Callable[[], bytes]
) -> None:
    path = tmp_path / name
    path.write_bytes(make())
    facts = validate_data(path)
    assert (facts.problem, facts.refused_row) == (None, None)
    assert training_problem(path) is None


def test_rows_beyond_the_limit_are_not_checked(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(lines({"prompt": "a"}, {"prompt": "b"}, {"prompt": True}))
    assert validate_data(path, ", limit: 2").refused_row is None
    assert training_problem(path, 2) is None
    assert validate_data(path, ", limit: 3").refused_row is not None
    assert training_problem(path, 3) is not None
