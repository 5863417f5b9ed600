"""Upstream errors that keys of the run file cause, and upstream errors that are defects."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trainer_helpers import ROWS, make_trainer

from toolkit.base.errors import ConfigError
from toolkit.config.rules.evaluation import CONDITIONAL_METRICS, METRICS
from toolkit.train.step import step_errors
from toolkit.train.upstream_errors import TOOLKIT_FOLDER


def fake_run(**grpo: Any) -> Any:
    """The fields of a RunConfig that the translation reads."""
    return SimpleNamespace(grpo=grpo, source="run.yaml")


CASES = {
    "schedule": ({"lr_scheduler_type": "warmup_stable_decay"}, "num_decay_steps"),
    "schedule in a step": (
        {"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": {"timescale": 0}},
        "division by zero",
    ),
    "optimizer": ({"optim": "sgd", "optim_args": "nesterov=true"}, "Nesterov"),
    "tracker": ({"report_to": ["wandbb"]}, "wandbb is not supported"),
    "loader": ({"dataloader_persistent_workers": True}, "num_workers"),
    "metric": (
        {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "accuracy"},
        "eval_accuracy",
    ),
    "trainer": ({"save_strategy": "best"}, "must be provided"),
    "TRL": ({"router_aux_loss_coef": 0.1}, "Mixture-of-Experts"),
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_an_upstream_error_names_the_keys_that_caused_it(tmp_path, name) -> None:
    grpo, words = CASES[name]
    rows = ROWS[:4] if "eval_strategy" in grpo else None
    with pytest.raises(Exception) as raised:  # noqa: PT011 - upstream chooses the class
        make_trainer(tmp_path, eval_rows=rows, **grpo).train()
    error = step_errors.translate(raised.value, "runs/x", fake_run(**grpo))
    assert isinstance(error, ConfigError)
    assert error.where == "run.yaml"
    assert words in error.message
    first = next(iter(grpo)) if name != "metric" else "metric_for_best_model"
    assert f"grpo.{first} is {grpo[first]!r}" in error.message
    assert "`envcheck explain grpo." in error.fix
    assert step_errors.translate(raised.value, "runs/x", fake_run(beta=0.0)) is None, (
        "the run file has no key that caused the error"
    )


def test_an_error_in_toolkit_code_that_upstream_calls_is_a_defect() -> None:
    """If a toolkit function that upstream calls raises, no key of the run file is the cause."""

    def in_toolkit(step: int) -> float:
        raise KeyError(step)

    def elsewhere(step: int) -> float:
        raise KeyError(step)

    in_toolkit.__code__ = in_toolkit.__code__.replace(
        co_filename=str(TOOLKIT_FOLDER / "train" / "made_up.py")
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(KeyError) as raised:
        torch.optim.lr_scheduler.LambdaLR(optimizer, in_toolkit)
    config = fake_run(lr_scheduler_type="linear", learning_rate=1e-6)
    assert step_errors.translate(raised.value, "runs/x", config) is None
    with pytest.raises(KeyError) as raised:
        torch.optim.lr_scheduler.LambdaLR(optimizer, elsewhere)
    assert step_errors.translate(raised.value, "runs/x", config) is not None


@pytest.mark.parametrize("engine", [False, True])
def test_the_rules_list_the_metrics_of_an_evaluation(tmp_path, engine) -> None:
    metrics = make_trainer(tmp_path, eval_rows=ROWS[:4], engine=engine).evaluate()
    names = {name.removeprefix("eval_") for name in metrics} - {
        "rewards/ones/mean",
        "rewards/ones/std",
    }
    assert set(METRICS) <= names
    assert names <= {*METRICS, *CONDITIONAL_METRICS}
