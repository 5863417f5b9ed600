"""One base has one fingerprint, however it is loaded; another base has another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from toolkit.base.errors import ConfigValueError, InputError
from toolkit.policy.fingerprint import (
    BaseDigests,
    checkpoint_digest,
    current_base_digests,
    is_recorded_base,
    weights_digest,
)
from toolkit.policy.language_model import FastLanguageModel


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_llama import make_tiny

    place = tmp_path_factory.mktemp("base") / "model"
    return make_tiny(place, tie_word_embeddings=request.param)


def plain(folder: Path, **values: Any) -> Any:
    return FastLanguageModel.from_pretrained(
        str(folder), **{"max_seq_length": 64, "load_in_4bit": False, **values}
    )[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_does_not_matter(folder: Path, dtype: str) -> None:
    assert current_base_digests(plain(folder, dtype=dtype)).checkpoint == checkpoint_digest(folder)


def test_the_number_of_shards_does_not_matter(folder: Path, tmp_path: Path) -> None:
    model = plain(folder)
    model.save_pretrained(tmp_path / "cut", max_shard_size="50KB")
    model.toolkit_tokenizer.save_pretrained(tmp_path / "cut")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 2
    assert checkpoint_digest(tmp_path / "cut") == checkpoint_digest(folder)
    assert current_base_digests(plain(tmp_path / "cut")) == current_base_digests(model)


def test_a_copy_in_another_dtype_is_the_same_base(folder: Path, tmp_path: Path) -> None:
    plain(folder, dtype="bfloat16").save_pretrained(tmp_path / "half")
    assert checkpoint_digest(tmp_path / "half") == checkpoint_digest(folder)


def test_one_layer_that_differs_makes_another_base(folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1.1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert checkpoint_digest(other) != checkpoint_digest(folder)
    recorded = described(plain(folder))
    assert is_recorded_base(recorded, plain(folder)) is True
    assert is_recorded_base(recorded, plain(other)) is False


def described(model: Any) -> dict[str, Any]:
    marks = current_base_digests(model)
    return {"checkpoint": marks.checkpoint, "fingerprint": marks.weights}


def test_a_base_in_4_bits_is_known_by_its_files(folder: Path) -> None:
    whole, packed = plain(folder), plain(folder)
    layer = packed.get_submodule("model.layers.0.mlp.up_proj")
    layer.weight = torch.nn.Parameter(torch.zeros(9, 1, dtype=torch.uint8), requires_grad=False)
    packed.toolkit_as_loaded = BaseDigests(checkpoint_digest(folder), None)
    assert weights_digest(packed) is None
    assert is_recorded_base(described(packed), whole) is True
    assert is_recorded_base(described(whole), packed) is True


@pytest.mark.parametrize("twice", [False, True], ids=["plain", "engine"])
def test_an_adapter_of_version_0_1_still_loads(folder: Path, tmp_path: Path, twice: bool) -> None:
    """Its base.json has one digest; with an engine a tied head was listed a second time."""
    model = FastLanguageModel.get_peft_model(plain(folder), r=4)
    saved = Path(model.save_lora(tmp_path / "adapter"))
    old = {
        "base_model_name_or_path": str(folder),
        "fingerprint": weights_digest(model, tied_twice=twice),
    }
    (saved / "base.json").write_text(json.dumps(old))
    assert plain(folder).load_lora(saved)
    (saved / "base.json").write_text(json.dumps({**old, "fingerprint": "0" * 16}))
    with pytest.raises(
        ConfigValueError, match=r"was trained on .* \(the digest of its base model is 0{16}, but"
    ):
        plain(folder).load_lora(saved)


def test_a_base_that_was_merged_into_is_no_longer_the_checkpoint(
    folder: Path, tmp_path: Path
) -> None:
    model = FastLanguageModel.get_peft_model(plain(folder), r=4, init_lora_weights=False)
    model = FastLanguageModel.get_peft_model(model.merge_and_unload(), r=4, lora_alpha=8)
    saved = model.save_lora(tmp_path / "second")
    assert json.loads((saved / "base.json").read_text())["checkpoint"] is None
    with pytest.raises(ConfigValueError, match="was trained on"):
        plain(folder).load_lora(saved)


def test_files_that_cannot_be_read_are_named(folder: Path, tmp_path: Path) -> None:
    torn = Path(shutil.copytree(folder, tmp_path / "torn"))
    (torn / "model.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match="cannot be read"):
        checkpoint_digest(torn)
    (torn / "model.safetensors").unlink()
    assert checkpoint_digest(torn) is None
