"""Settings of the optimizer that change on resume have effect from the first step on."""

from __future__ import annotations

import pytest
from trainer_helpers import adapter_digest, history, make_trainer


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Two of six steps, with a checkpoint."""
    folder = tmp_path_factory.mktemp("begun")
    trainer = make_trainer(folder, save_strategy="steps", save_steps=2)
    trainer.train()
    return folder / "checkpoint-2", trainer


def resumed(folder, begun, **changed):
    again = make_trainer(folder, **changed)
    again.train(str(begun[0]))
    return again


def rates(trainer):
    return [row["learning_rate"] for row in history(trainer)]


def test_a_changed_learning_rate_is_used_at_once(tmp_path, begun):
    before = rates(begun[1])
    assert before == pytest.approx([0.01 * (6 - step) / 6 for step in range(6)])
    again = resumed(tmp_path, begun, learning_rate=4e-2)
    assert rates(again) == pytest.approx([*before[:2], *(4 * rate for rate in before[2:])])
    assert adapter_digest(again) != adapter_digest(begun[1])


def test_a_changed_schedule_is_used_at_once(tmp_path, begun):
    again = resumed(tmp_path, begun, lr_scheduler_type="constant", weight_decay=0.25)
    assert rates(again)[2:] == [0.01] * 4
    (group, *_) = again.optimizer.param_groups
    assert group["weight_decay"] == 0.25


def test_more_steps_are_not_made_at_the_rate_of_the_old_end(tmp_path, begun):
    again = make_trainer(tmp_path, max_steps=8)
    again.train(str(begun[0].parent / "checkpoint-6"))
    assert rates(again)[6:] == pytest.approx([0.01 * 2 / 8, 0.01 * 1 / 8])
