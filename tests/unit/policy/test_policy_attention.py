"""The choice of the attention implementation, also for models that cap their attention scores."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from toolkit.base.errors import ConfigValueError
from toolkit.policy.attention import choose_attention

if TYPE_CHECKING:
    from pathlib import Path


def config_with_cap(cap: float | None) -> Any:
    text = SimpleNamespace(attn_logit_softcapping=cap)
    return SimpleNamespace(get_text_config=lambda: text)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a machine with a GPU, because flex attention has no backward pass on a CPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("requested", [None, "sdpa", "eager", "flex_attention"])
def test_without_a_cap_the_requested_attention_is_used(requested: str | None) -> None:
    assert choose_attention(config_with_cap(None), requested, "here") == requested
    config = SimpleNamespace(get_text_config=SimpleNamespace)
    assert choose_attention(config, requested, "here") == requested


@pytest.mark.parametrize(
    ("requested", "family", "message"),
    [
        ("flashattn", "llama", "is not one of eager, sdpa"),
        ("SDPA", "llama", "is not one of eager, sdpa"),
        ("kernels-community/flash-attn", "llama", "code from the hub"),
        ("flash_attention_2", "llama", "needs a GPU"),
        ("flex_attention", "llama", "no backward pass for it on a CPU"),
        ("sdpa", "gpt_oss", "has no sdpa attention"),  # because of its attention sinks
        ("flex_attention", "falcon", "has no flex_attention"),
    ],
)
def test_attention_that_model_or_machine_lacks_is_refused(
    requested: str, family: str, message: str
) -> None:
    text = SimpleNamespace(attn_logit_softcapping=None, model_type=family)
    with pytest.raises(ConfigValueError, match=message):
        choose_attention(SimpleNamespace(get_text_config=lambda: text), requested, "here")


@pytest.mark.usefixtures("gpu")
def test_with_a_cap_only_attention_that_applies_it_is_used() -> None:
    assert choose_attention(config_with_cap(50.0), None, "here") == "eager"
    assert choose_attention(config_with_cap(50.0), "flex_attention", "here") == "flex_attention"
    with pytest.raises(ConfigValueError, match=r"'sdpa' ignores .*softcapping \(50\)") as caught:
        choose_attention(config_with_cap(50.0), "sdpa", "here")
    assert "eager" in str(caught.value.fix)


@pytest.fixture(scope="module")
def capped_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a small Gemma 2 whose attention scores are far above its cap."""
    from tiny_llama import make_tiny
    from transformers import Gemma2Config, Gemma2ForCausalLM

    folder = make_tiny(tmp_path_factory.mktemp("gemma2") / "model")
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            attn_logit_softcapping=1.0,
            max_position_embeddings=256,
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(50)
    model.save_pretrained(folder)
    return folder


def test_the_loaded_model_computes_with_its_cap(
    capped_model_folder: Path, load: Any, ids: Any
) -> None:
    from transformers import AutoModelForCausalLM

    model, _ = load(capped_model_folder)
    eager, sdpa = (
        AutoModelForCausalLM.from_pretrained(capped_model_folder, attn_implementation=name)
        for name in ("eager", "sdpa")
    )
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.equal(logits, eager(ids).logits)
        assert (logits - sdpa(ids).logits).abs().max() > 1e-3
    with pytest.raises(ConfigValueError, match="ignores"):
        load(capped_model_folder, attn_implementation="sdpa")
