"""The choice of the table of tuned LoRA kernels that vLLM reads."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from toolkit.base.errors import InputError, ToolkitWarning
from toolkit.engine import lora_tables
from toolkit.engine.lora_tables import FOLDER_VARIABLE, OPS, TABLE_VARIABLE, use_table, write_table

if TYPE_CHECKING:
    from pathlib import Path

H200, H100, A100 = "NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"
CONFIG = {"2": {"1": {"64": {"4096": {"64": {"block_m": 16}}}}}}


@pytest.fixture(autouse=True)
def unset_table_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (FOLDER_VARIABLE, TABLE_VARIABLE):
        monkeypatch.setenv(name, "x")  # so that monkeypatch restores it after any change
        monkeypatch.delenv(name)
    monkeypatch.setattr(lora_tables, "_warned", set())
    monkeypatch.setattr(lora_tables, "_created_folders", {})


def write_tables(folder: Path, *names: str, version: str = "0.25.1") -> Path:
    for name in names:
        table: dict[str, Any] = {"vllm": version, "card": name, **dict.fromkeys(OPS, CONFIG)}
        write_table(table, folder / f"{name}.json")
    return folder


@pytest.mark.parametrize(
    ("card", "expected"),
    [(H200, "h200"), (H100, "h100"), ("NVIDIA H100 NVL", "h100"), (A100, "a100"), ("NVIDIA L4", 0)],
)
def test_the_table_is_chosen_by_the_name_of_the_card(
    tmp_path: Path, card: str, expected: str | int
) -> None:
    shipped = write_tables(tmp_path, "h200", "h100", "a100")
    path = lora_tables.find_table(card, shipped)
    assert (path.stem if path else 0) == expected


def test_a_card_uses_the_table_of_a_similar_card(tmp_path: Path) -> None:
    assert lora_tables.find_table(H100, write_tables(tmp_path, "h200")) == tmp_path / "h200.json"
    assert lora_tables.find_table(A100, tmp_path) is None


def test_vllm_finds_its_files_under_the_names_of_the_card(tmp_path: Path) -> None:
    shipped = write_tables(tmp_path, "a100")
    folder = use_table(A100, "0.25.1", shipped)
    assert folder is not None
    assert os.environ[FOLDER_VARIABLE] == str(folder)
    names = {path.name for path in folder.iterdir()}
    assert names == {f"NVIDIA_A100_SXM4_80GB_{op}.json" for op in OPS}
    assert json.loads((folder / "NVIDIA_A100_SXM4_80GB_SHRINK.json").read_text()) == CONFIG
    assert use_table(A100, "0.25.1", shipped) == folder  # the process loads a second model


def test_a_table_for_another_version_is_ignored_with_one_warning(tmp_path: Path) -> None:
    shipped = write_tables(tmp_path, "h200", version="0.24.0")
    with pytest.warns(
        ToolkitWarning, match=r"vLLM 0\.24\.0, but the installed version is vLLM 0\.25\.1"
    ):
        use_table(H200, "0.25.1", shipped)
    assert use_table(H200, "0.25.1", shipped) is None  # a second warning would be an error
    assert FOLDER_VARIABLE not in os.environ


def test_variables_of_the_user_take_precedence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = write_tables(tmp_path, "h200")
    (tmp_path / "own").mkdir()
    user_folder = write_tables(tmp_path / "own", "mine")
    monkeypatch.setenv(TABLE_VARIABLE, str(user_folder / "mine.json"))
    assert use_table("NVIDIA L4", "0.25.1", shipped) is not None
    monkeypatch.setenv(TABLE_VARIABLE, "off")
    assert use_table(H200, "0.25.1", shipped) is None
    assert FOLDER_VARIABLE not in os.environ  # the folder of the previous call is unset
    monkeypatch.delenv(TABLE_VARIABLE)
    monkeypatch.setenv(FOLDER_VARIABLE, "/elsewhere")
    assert use_table(H200, "0.25.1", shipped) is None
    assert os.environ[FOLDER_VARIABLE] == "/elsewhere"


@pytest.mark.parametrize("text", ["{}", "[]", '{"vllm": "0.25.1", "SHRINK": {}}', "{"])
def test_a_file_that_is_not_a_table_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    monkeypatch.setenv(TABLE_VARIABLE, str(path))
    with pytest.raises(InputError) as caught:
        use_table(H200, "0.25.1", tmp_path)
    assert caught.value.exit_code == 2
    assert str(path) in str(caught.value.where)


def test_shipped_tables_have_all_slice_counts() -> None:
    for path in lora_tables.SHIPPED_TABLES.glob("*.json"):
        table = lora_tables.read_table(path)
        for op in OPS:
            for slices in table[op].values():
                assert set(slices) >= {"1", "2", "3", "4", "5", "6", "7", "8"}
