"""The reference of the KL term is the policy at the start of the run. If the run starts from a
trained adapter, the reference is a copy of this adapter. If the adapter is new, the reference is
the base model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from trainer_helpers import history, make_trainer, short
from trl import GRPOTrainer as Trl

from toolkit.policy.adapter_io import save_lora
from toolkit.train.trainer import GRPOTrainer

if TYPE_CHECKING:
    from pathlib import Path


class TrainerWithStartedAdapter(GRPOTrainer):
    """A trainer of a model with a trained adapter (lora_B is not zero)."""

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) / 20)
        super().__init__(model, *args, **kwargs)


def adapter_tensors(trainer: Any, name: str) -> dict[str, torch.Tensor]:
    parameters = trainer.model.named_parameters()
    return {
        n.replace(f".{name}.", "."): p.detach().clone() for n, p in parameters if f".{name}." in n
    }


@pytest.mark.parametrize("engine", [False, True], ids=["transformers", "engine"])
def test_the_reference_is_the_starting_adapter(tmp_path: Path, engine: bool) -> None:
    trainer = make_trainer(
        tmp_path,
        engine=engine,
        kind=TrainerWithStartedAdapter,
        rewards=short,
        max_steps=2,
        beta=0.2,
    )
    start = adapter_tensors(trainer, "default")
    trainer.train()
    rows = history(trainer)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows[1]["kl"] > 1e-5
    reference, trained = adapter_tensors(trainer, "ref"), adapter_tensors(trainer, "default")
    assert reference.keys() == start.keys()
    assert all(torch.equal(reference[name], start[name]) for name in start)
    assert any(not torch.equal(trained[name], start[name]) for name in start)
    save_lora(trainer.model, tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert len(saved) == len(trained)
    assert not any("ref" in name.split(".") for name in saved)
    assert not (tmp_path / "saved" / "ref").exists()


def test_the_reference_adapter_is_not_rounded_on_a_4_bit_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL converts all adapters of a 4-bit model to bfloat16, including the reference adapter."""
    original_init = Trl.__init__

    def init_in_4_bit(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        model.is_loaded_in_4bit = True
        original_init(self, model, *args, **kwargs)

    monkeypatch.setattr(Trl, "__init__", init_in_4_bit)
    trainer = make_trainer(tmp_path, kind=TrainerWithStartedAdapter, beta=0.2)
    reference, trained = adapter_tensors(trainer, "ref"), adapter_tensors(trainer, "default")
    assert {value.dtype for value in reference.values()} == {torch.float32}
    assert all(torch.equal(reference[name], trained[name]) for name in trained)
