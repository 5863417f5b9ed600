"""Adapters on disk: what plain PEFT reads, equal bytes, and every way in which a folder can be
wrong.
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
from toolkit.policy.saved_adapter import read_adapter

WEIGHTS = "adapter_model.safetensors"


def _files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_plain_peft_reads_it_and_gives_equal_logits(
    adapted: Any, tiny: Path, tmp_path: Path, ids: Any
) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    for number, rslora in enumerate((False, True)):
        model = adapted(use_rslora=rslora)
        folder = model.save_lora(tmp_path / str(number))
        plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), folder)
        assert torch.equal(plain(ids).logits, model(ids).logits)
        with plain.disable_adapter():
            assert not torch.equal(plain(ids).logits, model(ids).logits)


def test_equal_adapters_give_equal_bytes(adapted: Any, tmp_path: Path) -> None:
    first = _files(adapted().save_lora(tmp_path / "a"))
    second = _files(adapted().save_lora(tmp_path / "b"))
    assert first == second
    assert {WEIGHTS, "adapter_config.json", "base.json"} <= first.keys()
    config = json.loads(first["adapter_config.json"])
    assert config["target_modules"] == sorted(config["target_modules"])


def test_saving_again_replaces_and_leaves_nothing_beside(adapted: Any, tmp_path: Path) -> None:
    model = adapted()
    model.save_lora(tmp_path / "a")
    with torch.no_grad():
        next(value for name, value in model.named_parameters() if "lora_B" in name).add_(1)
    before = _files(tmp_path / "a")
    model.save_lora(str(tmp_path / "a"))
    after = _files(tmp_path / "a")
    assert after[WEIGHTS] != before[WEIGHTS]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in (tmp_path / "a").iterdir())


def test_a_failed_save_leaves_the_old_one(
    adapted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted()
    before = _files(model.save_lora(tmp_path / "a"))

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(InputError, match="No space left on device"):
        model.save_lora(tmp_path / "a")
    assert _files(tmp_path / "a") == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_model_without_an_adapter_has_nothing_to_save(load: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigValueError, match="no adapter to save"):
        load()[0].save_lora(tmp_path / "a")


@pytest.fixture
def saved(adapted: Any, tmp_path: Path) -> Path:
    return Path(adapted().save_lora(tmp_path / "saved"))


def _change_tensors(folder: Path, change: Any) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _change_config(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _nan(tensors: Any) -> None:
    tensors[sorted(tensors)[0]][0, 0] = float("nan")


def _drop(tensors: Any) -> None:
    del tensors[sorted(tensors)[0]]


def _add(tensors: Any) -> None:
    tensors["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 64)


def _shape(tensors: Any) -> None:
    key = next(key for key in sorted(tensors) if "lora_A" in key)
    tensors[key] = torch.zeros(4, 65)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_nan, "1 of 28 tensors hold NaN or infinity, first base_model"),
        (_drop, "1 missing, first base_model"),
        (_add, "1 extra, first base_model.model.model.layers.9"),
        (_shape, r"1 of another shape, first .* is \(4, 65\), the model needs \(4,"),
    ],
)
def test_tensors_that_do_not_fit_are_named(load: Any, saved: Path, change: Any, words: str) -> None:
    _change_tensors(saved, change)
    with pytest.raises(ConfigValueError, match=words):
        load(saved)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"r": 8}, "has rank 4, and adapter_config.json says r=8"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', and only LORA"),
        ({"target_modules": ["wq"]}, "no module 'wq'"),
        ({"bias": "sometimes"}, "bias="),
        ({"r": 2.5}, "must be an integer"),
        ({"megatron_core": "os.path"}, "sets megatron_core, which is not supported"),
        ({"alora_invocation_tokens": [1]}, "sets alora_invocation_tokens"),
    ],
)
def test_configs_that_do_not_fit_are_named(
    load: Any, saved: Path, values: dict[str, Any], words: str
) -> None:
    _change_config(saved, **values)
    with pytest.raises(ConfigValueError, match=words):
        load(saved)


def test_another_base_is_refused_by_its_weights(load: Any, saved: Path, tmp_path: Path) -> None:
    from tiny_llama import make_tiny

    other = make_tiny(tmp_path / "other", seed=1)
    model, _ = load(other)
    with pytest.raises(
        ConfigValueError, match=r"was trained on .*model, and this model is .*other"
    ):
        model.load_lora(saved)


def test_another_hub_id_is_refused_by_name(load: Any, saved: Path) -> None:
    (saved / "base.json").unlink()
    _change_config(saved, base_model_name_or_path="someone/other-7b")
    model, _ = load()
    model.name_or_path = "someone/this-7b"
    with pytest.raises(
        ConfigValueError, match=r"someone/other-7b, and this model is someone/this-7b"
    ):
        model.load_lora(saved)


def test_a_copy_of_the_base_elsewhere_is_the_same_base(
    load: Any, saved: Path, tiny: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny, tmp_path / "copy")
    model, _ = load(tmp_path / "copy", dtype="bfloat16")
    assert model.load_lora(saved).adapter.config.r == 4


def test_a_pickle_is_not_read(saved: Path) -> None:
    (saved / WEIGHTS).rename(saved / "adapter_model.bin")
    with pytest.raises(ConfigValueError, match="a pickle can run code"):
        read_adapter(saved)


@pytest.mark.parametrize("size", [0, 7, 100, 2000])
def test_a_torn_file_is_never_loaded(saved: Path, size: int) -> None:
    (saved / WEIGHTS).write_bytes((saved / WEIGHTS).read_bytes()[:size])
    with pytest.raises(InputError, match="cannot be read") as caught:
        read_adapter(saved)
    assert WEIGHTS in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "\0"])
def test_a_broken_config_is_never_loaded(saved: Path, text: str) -> None:
    (saved / "adapter_config.json").write_text(text)
    with pytest.raises(InputError, match=r"adapter_config.json"):
        read_adapter(saved)


def test_folders_that_are_none(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no adapter's folder"):
        read_adapter(tmp_path / "nowhere")
    (saved / WEIGHTS).unlink()
    with pytest.raises(InputError, match=r"adapter_model.safetensors is missing"):
        read_adapter(saved)
