"""The split of a generation batch into micro-batches does not change the gradient, except for the
losses that rule GRPO029 refuses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from trainer_helpers import history, make_trainer

if TYPE_CHECKING:
    from pathlib import Path


def first_step(folder: Path, micro: int, **grpo: Any) -> dict[str, Any]:
    """The logged row of a step of 16 completions, split into micro-batches of ``micro``."""
    split = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": 16 // micro}
    trainer = make_trainer(folder, max_steps=1, generation_batch_size=16, **split, **grpo)
    trainer.train()
    return history(trainer)[0]


def norms(folder: Path, **grpo: Any) -> tuple[float, float]:
    whole, parts = (first_step(folder, micro, **grpo) for micro in (16, 4))
    assert whole["reward"] == parts["reward"]  # both runs draw the same completions
    return whole["grad_norm"], parts["grad_norm"]


@pytest.mark.parametrize(
    "loss_type",
    [
        "grpo",
        "dapo",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("dr_grpo", "cispo", "sapo")),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("luspo", "vespo")),
    ],
)
def test_the_split_does_not_change_the_gradient_norm(tmp_path: Path, loss_type: str) -> None:
    whole, parts = norms(tmp_path, loss_type=loss_type)
    assert parts == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize(
    "grpo", [{"loss_type": "bnpo"}, {"top_entropy_quantile": 0.5}], ids=["bnpo", "quantile"]
)
def test_refused_losses_depend_on_the_split(tmp_path: Path, grpo: dict[str, Any]) -> None:
    whole, parts = norms(tmp_path, **grpo)
    assert parts != pytest.approx(whole, rel=1e-3)
