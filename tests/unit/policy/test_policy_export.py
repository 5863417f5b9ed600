"""Merged weights: plain transformers loads them, and their logits equal those of base and
adapter.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from toolkit.base.errors import ConfigError, ConfigValueError, UnsupportedError
from toolkit.policy.load_request import check_request
from toolkit.policy.merged_export import merge_adapter, stored_dtype, write_adapter
from toolkit.policy.model_files import find_checkpoint
from toolkit.policy.saved_adapter import read_adapter


def _merge(base: Path, folder: Path, target: Path, **options: Any) -> Path:
    request = check_request({"model_name": str(base), "load_in_4bit": False, "max_seq_length": 128})
    return merge_adapter(
        find_checkpoint(str(base)), read_adapter(folder), request, target, **options
    )


@pytest.mark.parametrize("rslora", [False, True])
def test_the_merged_model_has_the_logits_of_base_and_adapter(
    adapted: Any, tiny: Path, tmp_path: Path, ids: Any, rslora: bool
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = adapted(use_rslora=rslora)
    target = _merge(tiny, model.save_lora(tmp_path / "a"), tmp_path / "merged")
    merged, info = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.allclose(merged(ids).logits, model(ids).logits, atol=1e-5)
    with model.disable_adapter():
        assert not torch.allclose(merged(ids).logits, model(ids).logits, atol=1e-3)
    assert (
        AutoTokenizer.from_pretrained(target)("12").input_ids
        == model.toolkit_tokenizer("12").input_ids
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "merged"]
    assert (target / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_the_base_folder_is_unchanged(adapted: Any, tiny: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in tiny.iterdir()}
    _merge(tiny, adapted().save_lora(tmp_path / "a"), tmp_path / "merged")
    assert {path.name: path.read_bytes() for path in tiny.iterdir()} == before


def test_merged_weights_are_rounded_once(adapted: Any, load: Any, tmp_path: Path) -> None:
    """In bfloat16, each merged weight is the rounded float32 sum, not a sum of rounded parts."""
    from safetensors.torch import load_file
    from tiny_llama import make_tiny

    from toolkit.policy.language_model import FastLanguageModel

    base = make_tiny(tmp_path / "half", dtype="bfloat16")
    model, _ = load(base, dtype="bfloat16")
    model = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    target = _merge(base, model.save_lora(tmp_path / "a"), tmp_path / "merged")
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    delta = (
        layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    )
    expected = (layer.base_layer.weight.float() + delta).bfloat16()
    merged_weight = load_file(target / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(merged_weight, expected)


def test_the_dtype_can_be_chosen(adapted: Any, tiny: Path, tmp_path: Path) -> None:
    target = _merge(
        tiny, adapted().save_lora(tmp_path / "a"), tmp_path / "merged", dtype="bfloat16"
    )
    assert stored_dtype(find_checkpoint(str(target))) == "bfloat16"
    assert stored_dtype(find_checkpoint(str(tiny))) == "float32"


@pytest.mark.parametrize(
    "values",
    [
        {"use_dora": True},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 1}},
        {"layers_to_transform": [0]},
    ],
)
def test_adapters_of_every_kind_are_merged(
    adapted: Any, tiny: Path, tmp_path: Path, ids: Any, values: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM

    model = adapted(**values)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embedding_A" in name or "modules_to_save" in name:
                parameter.add_(0.3)
    target = _merge(tiny, model.save_lora(tmp_path / "a"), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(target)
    assert torch.allclose(merged(ids).logits, model(ids).logits, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning")
def test_an_adapter_on_tied_embeddings_is_refused(load: Any, tmp_path: Path, ids: Any) -> None:
    from tiny_llama import make_tiny
    from transformers import AutoModelForCausalLM

    from toolkit.policy.language_model import FastLanguageModel

    base = make_tiny(tmp_path / "tied", tie_word_embeddings=True)
    for targets, refused in ((["q_proj"], False), (["q_proj", "lm_head"], True)):
        model = FastLanguageModel.get_peft_model(
            load(base)[0], r=4, target_modules=targets, use_gradient_checkpointing=False
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.1)
        folder = model.save_lora(tmp_path / str(refused))
        if refused:
            with pytest.raises(
                UnsupportedError, match="embeddings and the head of this model share one"
            ):
                _merge(base, folder, tmp_path / "merged")
        else:
            target = _merge(base, folder, tmp_path / "good")
            merged = AutoModelForCausalLM.from_pretrained(target)
            assert torch.allclose(merged(ids).logits, model(ids).logits, atol=1e-4)


def test_a_target_that_is_not_empty_is_refused(adapted: Any, tiny: Path, tmp_path: Path) -> None:
    folder = adapted().save_lora(tmp_path / "a")
    for target, words in ((folder, "is not empty"), (folder / "base.json", "is a file")):
        with pytest.raises(ConfigValueError, match=words):
            _merge(tiny, folder, target)
        with pytest.raises(ConfigValueError, match=words):
            write_adapter(find_checkpoint(str(tiny)), read_adapter(folder), target)


def test_a_full_disk_leaves_no_files(
    adapted: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedModel

    folder = adapted().save_lora(tmp_path / "a")

    def raise_disk_full(self: Any, folder: str, **kwargs: Any) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", raise_disk_full)
    with pytest.raises(ConfigError, match="No space left"):
        _merge(tiny, folder, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_an_adapter_is_written_with_its_tokenizer(adapted: Any, tiny: Path, tmp_path: Path) -> None:
    folder = adapted().save_lora(tmp_path / "a")
    target = write_adapter(find_checkpoint(str(tiny)), read_adapter(folder), tmp_path / "out")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (target / name).read_bytes() == (folder / name).read_bytes()
    assert (target / "tokenizer.json").is_file()
