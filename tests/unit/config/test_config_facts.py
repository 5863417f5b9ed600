"""Facts about models and datasets, which rules use together with the run file. Some of the test
files are hostile.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from toolkit.config.data_facts import DataFacts, read_data_facts
from toolkit.config.document_loader import parse_source
from toolkit.config.model_facts import ModelFacts, read_model
from toolkit.config.parquet import parquet_columns
from toolkit.config.source import Source

if TYPE_CHECKING:
    from toolkit.config.document import Document


def parse_run_file(folder: Path, text: str) -> Document:
    """Parse the text of a run file as if the file were in ``folder``."""
    return parse_source(Source("run.yaml", text, folder, folder / "run.yaml"))


def data_facts(folder: Path, path: str, prompt: str = "prompt") -> DataFacts:
    """The facts of a dataset."""
    result = read_data_facts(
        parse_run_file(folder, f"dataset: {{path: {path}, prompt: {prompt}}}"), "path"
    )
    assert result is not None
    return result


ROWS = [{"prompt": "a", "answer": 1}, {"prompt": "a", "answer": 2}, {"prompt": " ", "answer": 3}]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "wrapped.json"])
def test_columns_empty_and_repeated_prompts_are_counted(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data.{suffix}"
    if suffix == "jsonl":
        text = "\ufeff" + "\n\n".join(map(json.dumps, ROWS))
    elif suffix.endswith("json"):
        text = json.dumps({"data": ROWS} if suffix != "json" else ROWS)
    else:
        separator = "," if suffix == "csv" else "\t"
        text = "\n".join(
            separator.join(map(str, row.values())) for row in [{1: "prompt", 2: "answer"}, *ROWS]
        )
    path.write_text(text, "utf-8")
    facts = data_facts(tmp_path, path.name)
    assert (facts.columns, facts.rows) == (("prompt", "answer"), 3)
    assert (facts.empty_prompts, facts.repeated_prompts, facts.is_complete, facts.problem) == (
        1,
        1,
        True,
        None,
    )


def test_chats_count_as_prompts(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}]
    rows = [
        {"prompt": chat},
        {"prompt": chat},
        {"prompt": []},
        {"prompt": [{"role": "user", "content": ""}]},
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    facts = data_facts(tmp_path, "d.jsonl")
    assert (facts.rows, facts.empty_prompts, facts.repeated_prompts) == (4, 2, 1)


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("a.jsonl", b'{"prompt": 1}\n{', "line 2 is not JSON"),
        ("b.jsonl", b"[1]\n", "line 1 is not a JSON object"),
        ("c.json", b'{"rows": []}', "must be a list of objects"),
        ("d.jsonl", b"\xff\xfe", "is not UTF-8 text"),
        ("e.jsonl", b"", "has no rows"),
        ("f.json", b"[" * 100_000, ""),
    ],
)
def test_broken_data_has_a_problem(tmp_path: Path, name: str, data: bytes, problem: str) -> None:
    (tmp_path / name).write_bytes(data)
    facts = data_facts(tmp_path, name)
    assert facts.problem is not None
    assert problem in facts.problem


def test_only_the_first_rows_of_a_large_file_are_read(tmp_path: Path) -> None:
    line = json.dumps({"prompt": "x" * 1000}) + "\n"
    (tmp_path / "big.jsonl").write_text(line * 6000, "utf-8")
    facts = data_facts(tmp_path, "big.jsonl")
    assert not facts.is_complete
    assert 3000 < facts.rows < 6000


def test_columns_of_parquet_without_pyarrow(tmp_path: Path) -> None:
    table = pa.table(
        {
            "question": ["a"],
            "chat": [[{"role": "user", "content": "x"}]],
            "tags": [["t"]],
            "nested": [{"a": {"b": 1}, "c": 2.0}],
            "n\u00fcmber": [1],
        }
    )
    parquet.write_table(table, tmp_path / "d.parquet")
    assert data_facts(tmp_path, "d.parquet").columns == tuple(table.column_names)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_no_parquet_footer_breaks_the_reader(data: Any) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "d.parquet"
        parquet.write_table(pa.table({"a": [1], "b": [["x"]]}), path)
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 8))):
            content[-data.draw(st.integers(1, min(400, len(content))))] = data.draw(
                st.integers(0, 255)
            )
        path.write_bytes(
            content[: data.draw(st.integers(0, len(content)))]
            if data.draw(st.booleans())
            else content
        )
        with path.open("rb") as file:
            columns = parquet_columns(file)
        assert columns is None or all(isinstance(name, str) for name in columns)


def test_a_saved_folder_and_its_splits(tmp_path: Path) -> None:
    split = tmp_path / "saved" / "train"
    split.mkdir(parents=True)
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train"]}', "utf-8")
    (split / "dataset_info.json").write_text(
        '{"features": {"question": {}, "answer": {}}}', "utf-8"
    )
    assert data_facts(tmp_path, "saved").columns == ("question", "answer")


def model_of(config: dict[str, Any], folder: Path = Path("/")) -> ModelFacts:
    """The facts of a model with this config.json."""
    return ModelFacts(folder, config)


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"text_config": {"max_position_embeddings": 8192}}, 8192),
        ({"n_positions": 1024}, 1024),
        ({"max_position_embeddings": 40960, "rope_scaling": None}, 40960),
        (
            {"max_position_embeddings": 40960, "rope_scaling": {
                "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
            131072,
        ),
        (
            {"max_position_embeddings": 131072,
             "rope_scaling": {"rope_type": "llama3", "factor": 8}},
            131072,
        ),
        ({"max_position_embeddings": "many"}, None),
        ({"max_position_embeddings": -1}, None),
        ({"max_position_embeddings": 10, "rope_scaling": {"type": "linear", "factor": 1e300}}, 10),
    ],
)  # fmt: skip
def test_max_length_of_a_model(config: dict[str, Any], length: int | None) -> None:
    assert model_of(config).max_length == length


def test_modules_are_read_from_the_safetensors_header(tmp_path: Path) -> None:
    assert model_of({}, tmp_path).weight_modules is None
    header = json.dumps({"__metadata__": {}, "model.layers.0.mlp.up_proj.weight": {}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert model_of({}, tmp_path).weight_modules == {"model.layers.0.mlp.up_proj"}
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{")
    assert model_of({}, tmp_path).weight_modules is None


def test_a_model_in_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--org--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit, "ascii")
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "snapshots" / commit / "config.json").write_text(
        '{"num_attention_heads": 12}', "utf-8"
    )
    node = parse_run_file(tmp_path, "model: {model_name: org/name}").find_node(
        ("model", "model_name")
    )
    assert node is not None
    for revision in (None, "main", commit):
        facts = read_model(node, revision)
        assert facts is not None
        assert facts.attention_heads == 12
    assert read_model(node, "dev") is None
