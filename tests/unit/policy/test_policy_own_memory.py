"""Loaded weights are in the memory of the process: a later change of the file does not change
them.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import torch
from tiny_llama import make_tiny

from toolkit.base.errors import InputError
from toolkit.base.mapped_files import copy_mapped_weights, mapped_weight_files
from toolkit.policy.adapter_io import read_tensors
from toolkit.policy.language_model import FastLanguageModel
from toolkit.policy.saved_adapter import read_adapter

if TYPE_CHECKING:
    from pathlib import Path


def load_model(folder: Path) -> torch.nn.Module:
    model, _ = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, fast_inference=False, load_in_4bit=False
    )
    assert isinstance(model, torch.nn.Module)
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_truncating_the_weights_file_does_not_change_the_model(tmp_path: Path, tied: bool) -> None:
    folder = make_tiny(tmp_path / "model", tie_word_embeddings=tied)
    model = load_model(folder)
    assert [path for _, _, path in mapped_weight_files() if path.startswith(str(folder))] == []
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = model(ids).logits
    weights = folder / "model.safetensors"
    with weights.open("r+b") as file:
        file.write(b"\xff" * weights.stat().st_size)
    os.truncate(weights, 0)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    head = model.get_output_embeddings().weight
    assert (head is model.get_input_embeddings().weight) == tied


def test_weights_that_are_not_mapped_are_not_copied() -> None:
    model = torch.nn.Linear(4, 4)
    address = model.weight.data_ptr()
    assert copy_mapped_weights(model) == 0
    assert model.weight.data_ptr() == address


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "generation_config.json"])
def test_a_pipe_in_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = make_tiny(tmp_path / "model")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(InputError, match="is a pipe, not a regular file") as caught:
        load_model(folder)
    assert caught.value.where == str(folder.resolve() / name)


def test_a_pipe_in_an_adapter_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "adapter_config.json")
    with pytest.raises(InputError, match="is a pipe, not a regular file"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, (1 << 50).to_bytes(8, "little") + b"{}"])
def test_an_invalid_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        read_tensors(tmp_path / "x.safetensors")
