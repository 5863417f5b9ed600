"""Read data files with arbitrary content: the result must be rows or a ToolkitError, in time.

python tests/fuzz/fuzz_data.py [20000] [--seconds 3600] [--seed 0] [--workers 2]

The script makes files of every type, and then truncates, changes and splices them. The validator
checks each file, and training reads it. Both must agree: if the validator has read a whole file and
reports no problem, training can read the file, except for the types of its columns.
"""

from __future__ import annotations

import gzip
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
from fuzz_loop import Change, Round, change, main, measure_seconds, mutate, run_inputs
from hypothesis import strategies as st
from pyarrow import parquet

from toolkit.base.data_files import FILE_SUFFIXES
from toolkit.base.errors import InputError, ToolkitError
from toolkit.config.data_facts import _read
from toolkit.config.data_scan import DataSelection
from toolkit.train.data import data_checks
from toolkit.train.data.arrow_columns import as_dataset
from toolkit.train.data.row_reader import read_data_file

MEGABYTES = 1200.0
texts = st.text(max_size=12) | st.sampled_from(
    ["\ud800", "\0", "\x1b[31m", "a,b", '"', "\n", "None", '[{"role": "user", "content": "x"}]']
)
scalars = texts | st.none() | st.booleans() | st.integers() | st.floats() | st.just("x" * 9000)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from(["prompt", "answer", "images", "self", "class", "", "completions"]) | texts
row = st.dictionaries(names, values, max_size=4)
plain = st.fixed_dictionaries(
    {"prompt": texts.filter(str.isprintable), "answer": st.integers(0, 9)}
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "tool", "system", "x"]), "content": texts | st.none()},
        optional={"tool_calls": values, "name": texts},
    ),
    max_size=3,
)
chats = st.fixed_dictionaries({"prompt": messages | messages.map(json.dumps)})
ROWS = st.lists(row, max_size=4) | st.lists(plain, max_size=4) | st.lists(chats, max_size=4)


def encode_rows(rows: list[dict[str, Any]], suffix: str) -> bytes:
    """A file of ``rows``. If the file type cannot hold them, the content is similar to them."""
    if suffix.endswith(".gz"):
        return gzip.compress(encode_rows(rows, suffix.removesuffix(".gz")), compresslevel=1)
    if suffix in (".parquet", ".arrow"):
        return _table(rows, suffix)
    if suffix in (".csv", ".tsv"):
        mark = "," if suffix == ".csv" else "\t"
        lines = [mark.join(map(str, each)) for one in rows for each in (one, one.values())]
        return "\n".join(lines[:1] + lines[1::2]).encode("utf-8", "surrogatepass")
    if suffix == ".json":
        return json.dumps(rows).encode()
    return "\n".join(map(json.dumps, rows)).encode()


def _table(rows: list[dict[str, Any]], suffix: str) -> bytes:
    try:
        table = pa.Table.from_pylist(rows)
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        pairs = pa.array([[("a", 1)]], type=pa.map_(pa.string(), pa.int64()))
        table = pa.table({"prompt": ["x"], "pairs": pairs})
    sink = io.BytesIO()
    try:
        if suffix == ".parquet":
            parquet.write_table(table, sink)
        else:
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
    except (pa.ArrowException, ValueError):
        return b"PAR1"
    return sink.getvalue()


INPUT = (
    ROWS,
    st.sampled_from(FILE_SUFFIXES),
    st.lists(change, max_size=3),
    st.sampled_from([None, None, 1, 2]),
)


def check_input(
    folder: Path, rows: list[dict[str, Any]], suffix: str, changes: list[Change], limit: int | None
) -> float:
    """Check one file with both readers, and return the processor time in seconds."""
    path = folder / f"data{suffix}"
    path.write_bytes(mutate(encode_rows(rows, suffix), changes))
    return measure_seconds(lambda: _compare_scan_and_training(path, limit))


def _compare_scan_and_training(path: Path, limit: int | None) -> None:
    _read.cache_clear()
    facts = _read(path, DataSelection("prompt", "answer"), "train", (0, 0))
    refused = None
    try:
        _read_every_row(read_data_file(path, limit).table)
    except ToolkitError as error:
        refused = error
    seen = facts.is_complete and facts.columns is not None
    if isinstance(refused, InputError):
        assert facts.problem or not seen, f"only training refuses the file: {refused}"
    elif refused is None and limit is None:
        assert facts.problem in (None, "has no rows"), f"only validate refuses the file: {facts}"


def _read_every_row(table: pa.Table) -> None:
    """Process the columns as training does after it has read a file."""
    if "prompt" in table.column_names:
        found, _ = data_checks.parse_prompts(table["prompt"].to_pylist())
        assert len(found) == len(table)
    if "answer" in table.column_names and len(table):
        data_checks.clean_answers(table["answer"], "answer", "data")
    for one in as_dataset(table, "prompt" if "prompt" in table.column_names else None):
        assert isinstance(one, dict)


def run_round(one: tuple[int, int]) -> Round:
    """Check one round of inputs: ``one`` is (number of inputs, seed)."""
    with tempfile.TemporaryDirectory() as folder:
        return run_inputs(lambda *drawn: check_input(Path(folder), *drawn), *one, *INPUT)


if __name__ == "__main__":
    sys.exit(main(run_round, "Data files:", count=20_000, megabytes=MEGABYTES))
