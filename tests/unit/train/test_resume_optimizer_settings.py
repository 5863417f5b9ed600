"""Optimizer settings that change on resume take effect from the first resumed step."""

from __future__ import annotations

import pytest
from trainer_helpers import adapter_digest, history, make_trainer


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """A run of six steps: (the path of the checkpoint of step 2, the trainer)."""
    folder = tmp_path_factory.mktemp("first")
    trainer = make_trainer(folder, save_strategy="steps", save_steps=2)
    trainer.train()
    return folder / "checkpoint-2", trainer


def resume(folder, first_run, **changed):
    resumed = make_trainer(folder, **changed)
    resumed.train(str(first_run[0]))
    return resumed


def learning_rates(trainer):
    return [row["learning_rate"] for row in history(trainer)]


def test_a_changed_learning_rate_is_used_at_once(tmp_path, first_run):
    original_rates = learning_rates(first_run[1])
    assert original_rates == pytest.approx([0.01 * (6 - step) / 6 for step in range(6)])
    resumed = resume(tmp_path, first_run, learning_rate=4e-2)
    assert learning_rates(resumed) == pytest.approx(
        [*original_rates[:2], *(4 * rate for rate in original_rates[2:])]
    )
    assert adapter_digest(resumed) != adapter_digest(first_run[1])


def test_a_changed_schedule_is_used_at_once(tmp_path, first_run):
    resumed = resume(tmp_path, first_run, lr_scheduler_type="constant", weight_decay=0.25)
    assert learning_rates(resumed)[2:] == [0.01] * 4
    (group, *_) = resumed.optimizer.param_groups
    assert group["weight_decay"] == 0.25


def test_additional_steps_use_the_learning_rates_of_the_new_schedule(tmp_path, first_run):
    resumed = make_trainer(tmp_path, max_steps=8)
    resumed.train(str(first_run[0].parent / "checkpoint-6"))
    assert learning_rates(resumed)[6:] == pytest.approx([0.01 * 2 / 8, 0.01 * 1 / 8])
