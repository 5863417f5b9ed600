"""Reading saved adapters: an adapter that does not match the model or is invalid is refused, and
the error names the difference.
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


@pytest.fixture
def adapter_folder(adapted: Any, tmp_path: Path) -> Path:
    return Path(adapted().save_lora(tmp_path / "saved"))


def _change_tensors(folder: Path, change: Any) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _change_config(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _set_nan(tensors: Any) -> None:
    tensors[sorted(tensors)[0]][0, 0] = float("nan")


def _remove_tensor(tensors: Any) -> None:
    del tensors[sorted(tensors)[0]]


def _add_tensor(tensors: Any) -> None:
    tensors["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 64)


def _change_shape(tensors: Any) -> None:
    key = next(key for key in sorted(tensors) if "lora_A" in key)
    tensors[key] = torch.zeros(4, 65)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_set_nan, "1 of 28 tensors contain NaN or infinity, the first is base_model"),
        (_remove_tensor, "1 tensors are missing, the first is base_model"),
        (_add_tensor, "1 tensors are unexpected, the first is base_model.model.model.layers.9"),
        (
            _change_shape,
            r"1 tensors have another shape, the first is .* with shape \(4, 65\), but the model "
            r"needs \(4,",
        ),
    ],
)
def test_tensors_that_do_not_match_are_refused(
    load: Any, adapter_folder: Path, change: Any, words: str
) -> None:
    _change_tensors(adapter_folder, change)
    with pytest.raises(ConfigValueError, match=words):
        load(adapter_folder)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"r": 8}, "has rank 4, but adapter_config.json has r=8"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', but only LORA"),
        ({"target_modules": ["wq"]}, "no module 'wq'"),
        ({"bias": "sometimes"}, "bias="),
        ({"r": 2.5}, "must be an integer"),
        ({"megatron_core": "os.path"}, "sets megatron_core, which is not supported"),
        ({"alora_invocation_tokens": [1]}, "sets alora_invocation_tokens"),
        ({"target_modules": ".*"}, "PEFT cannot adapt these modules"),
        ({"target_modules": "([a-z._0-9]+)+!"}, "a repetition inside a repetition"),
        ({"rank_pattern": {"([a-z._0-9]+)+!": 4}}, "a repetition inside a repetition"),
    ],
)
def test_configs_that_do_not_match_are_refused(
    load: Any, adapter_folder: Path, values: dict[str, Any], words: str
) -> None:
    _change_config(adapter_folder, **values)
    with pytest.raises(ConfigValueError, match=words):
        load(adapter_folder)


def test_another_base_model_is_refused_by_its_digest(
    load: Any, adapter_folder: Path, tmp_path: Path
) -> None:
    from tiny_llama import make_tiny

    other = make_tiny(tmp_path / "other", seed=1)
    model, _ = load(other)
    with pytest.raises(
        ConfigValueError, match=r"was trained on .*model, but this model is .*other"
    ):
        model.load_lora(adapter_folder)


def test_another_hub_id_is_refused(load: Any, adapter_folder: Path) -> None:
    (adapter_folder / "base.json").unlink()
    _change_config(adapter_folder, base_model_name_or_path="someone/other-7b")
    model, _ = load()
    model.name_or_path = "someone/this-7b"
    with pytest.raises(
        ConfigValueError, match=r"someone/other-7b, but this model is someone/this-7b"
    ):
        model.load_lora(adapter_folder)


def test_a_copy_of_the_base_model_is_accepted(
    load: Any, adapter_folder: Path, tiny: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny, tmp_path / "copy")
    model, _ = load(tmp_path / "copy", dtype="bfloat16")
    assert model.load_lora(adapter_folder).adapter.config.r == 4


def test_a_pickle_is_not_read(adapter_folder: Path) -> None:
    (adapter_folder / WEIGHTS).rename(adapter_folder / "adapter_model.bin")
    with pytest.raises(ConfigValueError, match="a pickle can run code"):
        read_adapter(adapter_folder)


@pytest.mark.parametrize("size", [0, 7, 100, 2000])
def test_a_truncated_file_is_refused(adapter_folder: Path, size: int) -> None:
    (adapter_folder / WEIGHTS).write_bytes((adapter_folder / WEIGHTS).read_bytes()[:size])
    with pytest.raises(InputError, match="cannot be read") as caught:
        read_adapter(adapter_folder)
    assert WEIGHTS in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "\0"])
def test_an_invalid_config_is_refused(adapter_folder: Path, text: str) -> None:
    (adapter_folder / "adapter_config.json").write_text(text)
    with pytest.raises(InputError, match=r"adapter_config.json"):
        read_adapter(adapter_folder)


def test_folders_without_an_adapter_are_refused(adapter_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not the folder of an adapter"):
        read_adapter(tmp_path / "nowhere")
    (adapter_folder / WEIGHTS).unlink()
    with pytest.raises(InputError, match=r"adapter_model.safetensors is missing"):
        read_adapter(adapter_folder)


@pytest.mark.filterwarnings("ignore:.*embedding layers.*:UserWarning")
def test_base_weights_in_a_file_are_never_written_into_the_base(
    adapted: Any, load: Any, tmp_path: Path, ids: Any
) -> None:
    model = adapted(target_modules=["q_proj", "embed_tokens"])
    folder = model.save_lora(tmp_path / "a")
    model.save_pretrained(tmp_path / "b", save_embedding_layers=True)  # as plain PEFT does
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    assert key not in load_file(folder / WEIGHTS)
    assert key in load_file(tmp_path / "b" / WEIGHTS)
    loaded, _ = load(tmp_path / "b", use_gradient_checkpointing=False)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    _change_tensors(tmp_path / "b", lambda tensors: tensors[key].add_(1))
    with pytest.raises(ConfigValueError, match=f"1 tensors are unexpected, the first is {key}"):
        load(tmp_path / "b")


def test_a_refused_adapter_leaves_the_model_unchanged(
    adapted: Any, load: Any, adapter_folder: Path
) -> None:
    _change_tensors(adapter_folder, _remove_tensor)
    for model in (adapted(), load()[0]):
        names = [name for name, _ in model.named_parameters()]
        flags = [value.requires_grad for value in model.parameters()]
        with pytest.raises(ConfigValueError, match="1 tensors are missing"):
            model.load_lora(adapter_folder)
        assert [name for name, _ in model.named_parameters()] == names
        assert [value.requires_grad for value in model.parameters()] == flags
