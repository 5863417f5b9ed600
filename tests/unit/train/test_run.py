"""The number of steps of a run."""

from __future__ import annotations

import pytest
from trainer_helpers import make_trainer

from toolkit.train.run_end import total_steps

# An epoch has 12 batches, so two remain.
REMAINDER_PER_EPOCH = {"steps_per_generation": 1, "gradient_accumulation_steps": 5}


@pytest.mark.parametrize(
    "grpo",
    [
        {"max_steps": 2, "num_train_epochs": 9},
        {"max_steps": -1, "num_train_epochs": 0.2},
        {"max_steps": -1, "num_train_epochs": 1, **REMAINDER_PER_EPOCH},
    ],
)
def test_total_steps_is_the_number_of_trained_steps(tmp_path, grpo):
    trainer = make_trainer(tmp_path, **grpo)
    expected = total_steps(trainer)
    trainer.train()
    assert trainer.state.global_step == expected
