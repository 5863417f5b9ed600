"""A base model has the same fingerprint however it is loaded. Another base model has another
one.
"""

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
def base_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_llama import make_tiny

    model_folder = tmp_path_factory.mktemp("base") / "model"
    return make_tiny(model_folder, tie_word_embeddings=request.param)


def load_model(base_folder: Path, **values: Any) -> Any:
    return FastLanguageModel.from_pretrained(
        str(base_folder), **{"max_seq_length": 64, "load_in_4bit": False, **values}
    )[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_digest_does_not_depend_on_the_dtype(base_folder: Path, dtype: str) -> None:
    assert current_base_digests(
        load_model(base_folder, dtype=dtype)
    ).checkpoint == checkpoint_digest(base_folder)


def test_the_digest_does_not_depend_on_the_number_of_shards(
    base_folder: Path, tmp_path: Path
) -> None:
    model = load_model(base_folder)
    model.save_pretrained(tmp_path / "cut", max_shard_size="50KB")
    model.toolkit_tokenizer.save_pretrained(tmp_path / "cut")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 2
    assert checkpoint_digest(tmp_path / "cut") == checkpoint_digest(base_folder)
    assert current_base_digests(load_model(tmp_path / "cut")) == current_base_digests(model)


def test_a_copy_in_another_dtype_has_the_same_digest(base_folder: Path, tmp_path: Path) -> None:
    load_model(base_folder, dtype="bfloat16").save_pretrained(tmp_path / "half")
    assert checkpoint_digest(tmp_path / "half") == checkpoint_digest(base_folder)


def test_a_changed_layer_changes_the_digest(base_folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(base_folder, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1.1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert checkpoint_digest(other) != checkpoint_digest(base_folder)
    recorded = recorded_digests(load_model(base_folder))
    assert is_recorded_base(recorded, load_model(base_folder)) is True
    assert is_recorded_base(recorded, load_model(other)) is False


def recorded_digests(model: Any) -> dict[str, Any]:
    digests = current_base_digests(model)
    return {"checkpoint": digests.checkpoint, "fingerprint": digests.weights}


def test_a_4bit_base_is_identified_by_its_files(base_folder: Path) -> None:
    unquantized, packed = load_model(base_folder), load_model(base_folder)
    layer = packed.get_submodule("model.layers.0.mlp.up_proj")
    layer.weight = torch.nn.Parameter(torch.zeros(9, 1, dtype=torch.uint8), requires_grad=False)
    packed.toolkit_as_loaded = BaseDigests(checkpoint_digest(base_folder), None)
    assert weights_digest(packed) is None
    assert is_recorded_base(recorded_digests(packed), unquantized) is True
    assert is_recorded_base(recorded_digests(unquantized), packed) is True


@pytest.mark.parametrize("tied_twice", [False, True], ids=["plain", "engine"])
def test_an_adapter_of_version_0_1_still_loads(
    base_folder: Path, tmp_path: Path, tied_twice: bool
) -> None:
    """The base.json of version 0.1 has only one digest. With an engine, this digest counted a tied
    head twice.
    """
    model = FastLanguageModel.get_peft_model(load_model(base_folder), r=4)
    saved = Path(model.save_lora(tmp_path / "adapter"))
    old = {
        "base_model_name_or_path": str(base_folder),
        "fingerprint": weights_digest(model, tied_twice=tied_twice),
    }
    (saved / "base.json").write_text(json.dumps(old))
    assert load_model(base_folder).load_lora(saved)
    (saved / "base.json").write_text(json.dumps({**old, "fingerprint": "0" * 16}))
    with pytest.raises(
        ConfigValueError, match=r"was trained on .* \(the digest of its base model is 0{16}, but"
    ):
        load_model(base_folder).load_lora(saved)


def test_a_merged_model_has_no_checkpoint_digest(base_folder: Path, tmp_path: Path) -> None:
    model = FastLanguageModel.get_peft_model(load_model(base_folder), r=4, init_lora_weights=False)
    model = FastLanguageModel.get_peft_model(model.merge_and_unload(), r=4, lora_alpha=8)
    saved = model.save_lora(tmp_path / "second")
    assert json.loads((saved / "base.json").read_text())["checkpoint"] is None
    with pytest.raises(ConfigValueError, match="was trained on"):
        load_model(base_folder).load_lora(saved)


def test_unreadable_files_are_refused(base_folder: Path, tmp_path: Path) -> None:
    damaged_folder = Path(shutil.copytree(base_folder, tmp_path / "torn"))
    (damaged_folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match="cannot be read"):
        checkpoint_digest(damaged_folder)
    (damaged_folder / "model.safetensors").unlink()
    assert checkpoint_digest(damaged_folder) is None
