"""Tests of the policy that need a GPU: 4-bit weights, activations offloaded to the host, dtypes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a Llama whose activations are large enough to be measured."""
    sys.path.append(str(Path(__file__).resolve().parents[1] / "fixtures"))
    from tiny_llama import make_tiny

    return make_tiny(
        tmp_path_factory.mktemp("gpu") / "model",
        hidden_size=1024,
        head_dim=64,
        intermediate_size=2048,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        dtype="bfloat16",
    )


def _load_with_adapter(folder: Path, mode: Any, **values: Any) -> Any:
    from toolkit.policy.language_model import FastLanguageModel

    plain = {"max_seq_length": 2048, "load_in_4bit": False}
    model, _ = FastLanguageModel.from_pretrained(str(folder), **{**plain, **values})
    model = FastLanguageModel.get_peft_model(model, r=16, use_gradient_checkpointing=mode)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.linspace(-0.01, 0.01, parameter.numel()).view_as(parameter))
    return model


def _peak_and_gradients(model: Any) -> tuple[int, dict[str, Any]]:
    """(peak bytes above the start, gradients) of one forward and backward pass."""
    ids = (torch.arange(4 * 2048, device="cuda").view(4, 2048) % 50) + 3
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    model(ids, labels=ids, use_cache=False).loss.backward()
    torch.cuda.synchronize()
    gradients = {
        name: value.grad.float().cpu()
        for name, value in model.named_parameters()
        if value.requires_grad
    }
    return torch.cuda.max_memory_allocated() - start, gradients


def test_checkpointing_modes_save_memory_and_keep_the_gradients(folder: Path) -> None:
    peak_and_gradients = {}
    for mode in (False, True, "unsloth"):
        model = _load_with_adapter(folder, mode)
        peak_and_gradients[mode] = _peak_and_gradients(model)
        del model
    assert (
        peak_and_gradients[False][0]
        > peak_and_gradients[True][0]
        > peak_and_gradients["unsloth"][0]
    )
    for mode in (True, "unsloth"):
        for name, gradient in peak_and_gradients[False][1].items():
            assert torch.allclose(
                peak_and_gradients[mode][1][name], gradient, atol=1e-2, rtol=1e-2
            ), name


def test_bfloat16_base_and_float32_adapter(folder: Path) -> None:
    model = _load_with_adapter(folder, False)
    assert model.get_base_model().dtype is torch.bfloat16
    trained = {value.dtype for value in model.parameters() if value.requires_grad}
    assert trained == {torch.float32}


def test_a_4bit_model_trains_and_generates(folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = _load_with_adapter(folder, "unsloth", load_in_4bit=True)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    assert type(layer.base_layer).__name__ == "Linear4bit"
    assert layer.base_layer.weight.quant_state.quant_type == "nf4"
    assert not layer.base_layer.weight.quant_state.nested
    _, gradients = _peak_and_gradients(model)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert any(gradient.abs().sum() > 0 for gradient in gradients.values())
    answer = model.fast_generate("12+3=", max_tokens=4, temperature=0)[0]
    assert len(answer.outputs[0].token_ids) > 0


def test_memory_is_allocated_in_expandable_segments(folder: Path) -> None:
    """This holds even if CUDA was initialized before, as importing bitsandbytes does."""
    torch.cuda.init()
    _load_with_adapter(folder, False)
    tensor = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")
    segments = [one for one in torch.cuda.memory_snapshot() if one["total_size"] >= tensor.numel()]
    assert segments
    assert all(one["is_expandable"] for one in segments)
