"""use_gradient_checkpointing: the effect of each value, and that the effect persists."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from toolkit.base.errors import UnsupportedError
from toolkit.policy import gradient_checkpointing
from toolkit.policy.language_model import FastLanguageModel


def _gradients(model: Any, ids: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return {name: value.grad for name, value in model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize(("mode", "enabled"), [(True, True), ("unsloth", True), (False, False)])
def test_the_mode_is_set_and_no_gradient_changes(
    adapted: Any, ids: Any, mode: Any, enabled: bool
) -> None:
    expected = _gradients(adapted(), ids)
    model = adapted(use_gradient_checkpointing=mode)
    assert model.is_gradient_checkpointing is enabled
    gradients = _gradients(model, ids)
    assert expected.keys() == gradients.keys()
    assert all(torch.allclose(expected[name], gradients[name], atol=1e-6) for name in expected)
    assert any(value.abs().sum() > 0 for value in gradients.values())


def test_inference_pauses_checkpointing_and_training_resumes_it(adapted: Any) -> None:
    model = adapted(use_gradient_checkpointing=True)
    assert FastLanguageModel.for_inference(model) is model
    assert not model.is_gradient_checkpointing
    assert not model.training
    FastLanguageModel.for_training(model)
    assert model.is_gradient_checkpointing
    assert model.training
    FastLanguageModel.for_training(model, use_gradient_checkpointing=False)
    assert not model.is_gradient_checkpointing


def test_a_model_without_checkpointing_stays_without_it(adapted: Any) -> None:
    model = adapted(use_gradient_checkpointing=False)
    FastLanguageModel.for_training(FastLanguageModel.for_inference(model))
    assert not model.is_gradient_checkpointing


class Recorder:
    """A fake transformers model on a GPU that records the arguments of
    gradient_checkpointing_enable.
    """

    device = torch.device("cuda", 0)
    supports_gradient_checkpointing = True
    calls: list[tuple[Any, int, bool]]

    def __init__(self) -> None:
        self.calls = []

    def gradient_checkpointing_enable(
        self, kwargs: Any = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        self.calls.append((kwargs, every_n_layers, offload))

    def gradient_checkpointing_disable(self) -> None:
        self.calls.append(("off", 0, False))

    def disable_input_require_grads(self) -> None:
        pass


def test_offloading_stays_on_if_a_trainer_omits_it() -> None:
    model = Recorder()
    gradient_checkpointing.apply_checkpointing(model, "unsloth", max_seq_length=8)
    model.gradient_checkpointing_enable({"use_reentrant": False})  # as TRL does after a rollout
    model.gradient_checkpointing_enable({"use_reentrant": False, "offload": True})
    assert model.calls == [({"use_reentrant": False}, 1, True)] * 3


def test_without_unsloth_mode_nothing_is_offloaded() -> None:
    model = Recorder()
    gradient_checkpointing.apply_checkpointing(model, True, max_seq_length=8)
    model.gradient_checkpointing_enable({"use_reentrant": False, "every_n_layers": 2})
    assert model.calls == [
        ({"use_reentrant": False}, 1, False),
        ({"use_reentrant": False}, 2, False),
    ]


@pytest.mark.parametrize(
    ("free_bytes", "mode"), [(10**12, False), (5 * 10**9, True), (10**8, "unsloth")]
)
def test_auto_chooses_by_free_memory(
    monkeypatch: pytest.MonkeyPatch, free_bytes: int, mode: Any
) -> None:
    """8 sequences of 1000 tokens in 32 layers with hidden size 1000 have 0.5 GB of hidden states in
    bfloat16.
    """
    monkeypatch.setattr(gradient_checkpointing, "free_memory_bytes", lambda device: free_bytes)
    config = SimpleNamespace(hidden_size=1000, num_hidden_layers=32, max_position_embeddings=9)
    config.get_text_config = lambda: config
    model = SimpleNamespace(config=config, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert gradient_checkpointing.choose_mode(model, max_seq_length=1000) == mode


def test_auto_switches_checkpointing_off_for_a_tiny_model(adapted: Any) -> None:
    assert not adapted(use_gradient_checkpointing="auto").is_gradient_checkpointing
    assert gradient_checkpointing.free_memory_bytes(torch.device("cpu")) > 1 << 20


def test_a_model_without_support_is_refused() -> None:
    model = Recorder()
    model.supports_gradient_checkpointing = False
    with pytest.raises(UnsupportedError, match="Recorder does not support gradient checkpointing"):
        gradient_checkpointing.apply_checkpointing(model, True, max_seq_length=8)
    gradient_checkpointing.apply_checkpointing(model, False, max_seq_length=8)
    assert model.calls == [("off", 0, False)]


def test_a_deep_copy_switches_only_itself(adapted: Any) -> None:
    """TRL deep-copies reference models: the methods of the copy must not change the original
    model.
    """
    model = adapted(use_gradient_checkpointing=True)
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing_disable()
    assert model.is_gradient_checkpointing
    twin.gradient_checkpointing_enable()
    assert twin.is_gradient_checkpointing
    FastLanguageModel.for_inference(model)
    assert twin.is_gradient_checkpointing
