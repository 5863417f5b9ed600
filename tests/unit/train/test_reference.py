"""The reference of the KL term is the policy that the run started from: an adapter that was there
is copied, and the base is the reference of a fresh one.
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


class Started(GRPOTrainer):
    """On a model whose adapter is not fresh: B is no zero."""

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) / 20)
        super().__init__(model, *args, **kwargs)


def adapters(trainer: Any, name: str) -> dict[str, torch.Tensor]:
    found = trainer.model.named_parameters()
    return {n.replace(f".{name}.", "."): p.detach().clone() for n, p in found if f".{name}." in n}


@pytest.mark.parametrize("engine", [False, True], ids=["transformers", "engine"])
def test_the_reference_is_the_starting_adapter(tmp_path: Path, engine: bool) -> None:
    trainer = make_trainer(
        tmp_path, engine=engine, kind=Started, rewards=short, max_steps=2, beta=0.2
    )
    start = adapters(trainer, "default")
    trainer.train()
    rows = history(trainer)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows[1]["kl"] > 1e-5
    kept, trained = adapters(trainer, "ref"), adapters(trainer, "default")
    assert kept.keys() == start.keys()
    assert all(torch.equal(kept[name], start[name]) for name in start)
    assert any(not torch.equal(trained[name], start[name]) for name in start)
    save_lora(trainer.model, tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert len(saved) == len(trained)
    assert not any("ref" in name.split(".") for name in saved)
    assert not (tmp_path / "saved" / "ref").exists()


def test_the_copy_is_not_rounded_on_a_packed_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL casts all adapters of a model in 4 bits to bfloat16, its copy too."""
    built = Trl.__init__

    def packed(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        model.is_loaded_in_4bit = True
        built(self, model, *args, **kwargs)

    monkeypatch.setattr(Trl, "__init__", packed)
    trainer = make_trainer(tmp_path, kind=Started, beta=0.2)
    kept, trained = adapters(trainer, "ref"), adapters(trainer, "default")
    assert {value.dtype for value in kept.values()} == {torch.float32}
    assert all(torch.equal(kept[name], trained[name]) for name in trained)
