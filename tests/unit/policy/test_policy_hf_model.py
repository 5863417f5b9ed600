"""Loading the base model: dtype, positions, missing tensors, and invalid checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from toolkit.base.errors import ConfigValueError, InputError, MissingExtraError, UnsupportedError
from toolkit.policy import hf_model
from toolkit.policy.language_model import FastLanguageModel


@pytest.fixture
def checkpoint_copy(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that a test may change."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def _edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_the_model_computes_like_transformers(load: Any, tiny: Path, ids: Any) -> None:
    from transformers import AutoModelForCausalLM

    model, _ = load()
    plain = AutoModelForCausalLM.from_pretrained(tiny)
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.max_seq_length == 128
    assert model.vllm_engine is None
    assert model.name_or_path == str(tiny)


@pytest.mark.parametrize(
    ("arguments", "dtype"),
    [
        ({}, torch.float32),
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": torch.float16}, torch.float16),
        ({"load_in_16bit": True}, torch.bfloat16),
        ({"float32_mixed_precision": True}, torch.float32),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests the choice on a machine without a GPU")
def test_the_dtype_on_a_cpu(load: Any, arguments: dict[str, Any], dtype: torch.dtype) -> None:
    assert load(**arguments)[0].dtype is dtype


def test_full_finetuning_trains_every_weight(load: Any) -> None:
    model, _ = load(full_finetuning=True, use_gradient_checkpointing=False)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.warns(UserWarning, match="no adapter was added"):
        assert FastLanguageModel.get_peft_model(model) is model


def test_four_bits_need_a_gpu(load: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for flag in ("load_in_4bit", "load_in_8bit"):
        with pytest.raises(UnsupportedError, match=f"{flag}=True needs an NVIDIA GPU") as caught:
            load(**{flag: True})
        assert f"pass {flag}=False" in str(caught.value)
    with pytest.raises(UnsupportedError, match="the default of load_in_4bit is True"):
        FastLanguageModel.from_pretrained(str(tiny))


def test_four_bits_need_bitsandbytes(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(hf_model, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"bitsandbytes.*\n.*grpo-toolkit\[cuda\]"):
        load(load_in_4bit=True)


def test_rope_scaling_is_applied(load: Any, ids: Any) -> None:
    model, _ = load(rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert model.config.rope_parameters == {
        "rope_type": "linear",
        "factor": 2.0,
        "rope_theta": 10000.0,
    }
    assert not torch.allclose(model(ids).logits, load()[0](ids).logits)
    old_spelling, _ = load(rope_scaling={"type": "linear", "factor": 2.0})
    assert torch.equal(old_spelling(ids).logits, model(ids).logits)


def test_a_longer_max_seq_length_extends_positions_with_a_warning(load: Any, ids: Any) -> None:
    with pytest.warns(UserWarning, match=r"max_seq_length=512 is beyond the 256 positions"):
        model, _ = load(max_seq_length=512)
    assert model.config.rope_parameters["rope_type"] == "dynamic"
    assert model.config.rope_parameters["factor"] == 2.0
    assert torch.equal(model(ids).logits, load()[0](ids).logits)  # within 256, nothing changes
    long = torch.full((1, 400), 7)
    assert model(long).logits.isfinite().all()


def test_extended_positions_are_not_extended_again(load: Any, checkpoint_copy: Path) -> None:
    _edit_config(
        checkpoint_copy,
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    )
    with pytest.raises(ConfigValueError, match=r"already extends them .rope_type linear"):
        load(checkpoint_copy, max_seq_length=512)


@pytest.mark.parametrize("scaling", [{"rope_type": "linear"}, {"factor": 2.0}, {"rope_type": "x"}])
def test_invalid_rope_scaling_is_refused(load: Any, scaling: dict[str, Any]) -> None:
    with pytest.raises(ConfigValueError, match="rope_scaling"):
        load(rope_scaling=scaling)


def test_resizing_the_vocabulary(load: Any) -> None:
    state = torch.get_rng_state()
    first, second = (load(resize_model_vocab=64)[0] for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.get_input_embeddings().weight.shape[0] == 64
    assert torch.equal(first.get_output_embeddings().weight, second.get_output_embeddings().weight)


def test_a_device_map_that_names_a_missing_gpu_is_refused(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device_map in ("cuda:1", 0, {"": "cuda"}):
        with pytest.raises(ConfigValueError, match="names a GPU"):
            load(device_map=device_map)
    assert load(device_map="cpu")[0].device.type == "cpu"
    assert load(device_map="auto")[0].device.type == "cpu"


def _change_tensors(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_and_extra_tensors_are_named(load: Any, checkpoint_copy: Path) -> None:
    _change_tensors(
        checkpoint_copy, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight")
    )
    with pytest.raises(
        InputError, match=r"does not contain 1 tensors of the model: model.layers.1"
    ):
        load(checkpoint_copy)
    _change_tensors(
        checkpoint_copy,
        lambda tensors: tensors.update(
            {"model.layers.1.mlp.up_proj.weight": torch.zeros(128, 64), "foo": torch.zeros(1)}
        ),
    )
    with pytest.raises(InputError, match="contains 1 tensors that the model does not have: foo"):
        load(checkpoint_copy)


def test_tensors_with_a_wrong_shape_are_refused(load: Any, checkpoint_copy: Path) -> None:
    _change_tensors(
        checkpoint_copy, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(65)})
    )
    with pytest.raises(InputError, match=r"cannot be loaded: the shapes of its weights differ"):
        load(checkpoint_copy)


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("config.json", {"hidden_act": "zzz"}, "KeyError: 'zzz'"),
        ("config.json", {"pad_token_id": 5000}, "AssertionError: Padding_idx"),
        ("generation_config.json", [], "TypeError: list indices"),
    ],
)
def test_values_that_transformers_cannot_use_are_input_errors(
    load: Any, checkpoint_copy: Path, file: str, text: Any, reason: str
) -> None:
    path = checkpoint_copy / file
    if isinstance(text, dict):
        text = json.loads(path.read_text()) | text
    path.write_text(json.dumps(text))
    with pytest.raises(InputError, match=f"the model cannot be loaded: {reason}") as refused:
        load(checkpoint_copy)
    assert "config.json" in str(refused.value.fix)


def test_truncated_weights_are_refused(load: Any, checkpoint_copy: Path) -> None:
    path = checkpoint_copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot be loaded"):
        load(checkpoint_copy)


def test_pickled_weights_are_read_only_if_requested(
    load: Any, checkpoint_copy: Path, ids: Any
) -> None:
    tensors = load_file(checkpoint_copy / "model.safetensors")
    torch.save(tensors, checkpoint_copy / "pytorch_model.bin")
    (checkpoint_copy / "model.safetensors").unlink()
    with pytest.raises(ConfigValueError, match="a pickle can run code") as caught:
        load(checkpoint_copy)
    assert "use_safetensors=False" in str(caught.value)
    model, _ = load(checkpoint_copy, use_safetensors=False)
    assert torch.equal(model(ids).logits, load()[0](ids).logits)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("/nowhere/at/all", "does not exist"),
        ("./nowhere", "does not exist"),
        ("a/b/c", "does not exist"),
    ],
)
def test_a_missing_folder_is_refused(load: Any, name: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        load(name)


def test_folders_without_a_checkpoint_are_refused(
    load: Any, tmp_path: Path, checkpoint_copy: Path
) -> None:
    with pytest.raises(InputError, match=r"neither config.json nor adapter_config.json"):
        load(tmp_path)
    with pytest.raises(InputError, match="is a file"):
        load(checkpoint_copy / "config.json")
    (checkpoint_copy / "model.safetensors").unlink()
    with pytest.raises(InputError, match="has no weights"):
        load(checkpoint_copy)


def test_an_invalid_config_is_refused(load: Any, checkpoint_copy: Path) -> None:
    (checkpoint_copy / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config.json cannot be used"):
        load(checkpoint_copy)
    (checkpoint_copy / "config.json").write_text('{"model_type": "never_heard_of"}')
    with pytest.raises(UnsupportedError, match="does not have the model type 'never_heard_of'"):
        load(checkpoint_copy)


def test_a_multimodal_model_is_refused(load: Any, checkpoint_copy: Path) -> None:
    (checkpoint_copy / "config.json").write_text(
        '{"model_type": "llava", "text_config": {"model_type": "llama"}}'
    )
    with pytest.raises(UnsupportedError, match="'llava' is a multimodal model"):
        load(checkpoint_copy)


def test_a_quantized_checkpoint_needs_its_flag(load: Any, checkpoint_copy: Path) -> None:
    _edit_config(
        checkpoint_copy, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}
    )
    with pytest.raises(ConfigValueError, match=r"stored in bitsandbytes 4-bit, but load_in_4bit"):
        load(checkpoint_copy)


@pytest.mark.parametrize("method", ["awq", "gptq", "fp8", "mxfp4", "compressed-tensors", "new"])
def test_other_stored_formats_are_refused_whatever_the_flags(
    load: Any, checkpoint_copy: Path, method: str
) -> None:
    _edit_config(checkpoint_copy, quantization_config={"quant_method": method})
    with pytest.raises(UnsupportedError, match="an adapter on this format is not supported"):
        load(checkpoint_copy)


def test_an_encoder_is_refused(load: Any, checkpoint_copy: Path) -> None:
    _edit_config(checkpoint_copy, model_type="t5")
    with pytest.raises(UnsupportedError, match="'t5' is not a causal language model"):
        load(checkpoint_copy)


def test_a_revision_needs_a_hub_id(load: Any) -> None:
    with pytest.raises(ConfigValueError, match="is a folder"):
        load(revision="main")
