"""Files of weights are read into the operating system's cache while other modules are imported."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from toolkit.base import read_ahead as module
from toolkit.base.read_ahead import read_ahead

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def weights_folder(tmp_path: Path) -> Path:
    """A folder with two files of weights, another file, and a pipe without a writer."""
    (tmp_path / "a.safetensors").write_bytes(b"a" * 3000)
    (tmp_path / "b.safetensors").write_bytes(b"b" * 1001)
    (tmp_path / "config.json").write_bytes(b"{}" * 500)
    os.mkfifo(tmp_path / "c.safetensors")
    return tmp_path


def test_every_byte_of_the_weights_is_read_once(
    weights_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 700)
    monkeypatch.setattr(module, "BLOCK_BYTES", 700)
    reading = read_ahead(weights_folder, 1 << 30)
    assert reading is not None
    reading.wait()
    assert reading.bytes_read >= 4001
    assert read_ahead(weights_folder, 1 << 30) is None  # not read twice


def test_a_folder_that_does_not_fit_or_does_not_exist_is_not_read(
    weights_folder: Path, tmp_path: Path
) -> None:
    assert read_ahead(weights_folder, 5000) is None
    assert read_ahead(tmp_path / "nothing", 1 << 30) is None
    assert read_ahead("org/model", 1 << 30) is None


def test_a_file_that_disappears_causes_no_error(weights_folder: Path) -> None:
    reading = module.ReadAhead([weights_folder / "a.safetensors"])
    (weights_folder / "a.safetensors").unlink()
    reading.start()
    reading.wait()
    assert reading.bytes_read == 0
