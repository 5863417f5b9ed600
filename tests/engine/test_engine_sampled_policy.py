"""With every sampling option of the engine, the sampled policy is the trained policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import engine_training as training
import pytest

from toolkit.base.errors import ConfigValueError, ToolkitWarning

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.engine

TOLERANCE = 1e-5  # nats, float32
RATIO_METRIC = "sampling/importance_sampling_ratio/mean"

OPTIONS: dict[str, dict[str, Any]] = {
    "top_p": {"top_p": 0.9},
    "top_k": {"top_k": 10},
    "min_p": {"min_p": 0.1},
    "temperature": {"temperature": 0.7},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "presence and frequency": {
        "generation_kwargs": {"presence_penalty": 0.8, "frequency_penalty": -0.5}
    },
    "all": {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 10,
        "min_p": 0.1,
        "repetition_penalty": 1.3,
        "generation_kwargs": {"presence_penalty": 0.5},
    },
    "min_p before top_k": {"top_k": 40, "top_p": 0.8, "min_p": 0.02},
    "two passes": {"top_p": 0.8, "num_iterations": 2, "beta": 0.1},
}


@pytest.fixture(autouse=True)
def silence_print(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.print", lambda *a, **k: None)  # HF's PrinterCallback


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """(model with its engine, tokenizer), shared by the tests of the module."""
    from tiny_llama import make_tiny

    model, tokenizer = training.load_with_engine(
        make_tiny(tmp_path_factory.mktemp("sampled") / "model")
    )
    with model.toolkit_engine:
        yield model, tokenizer


def train_run(loaded: tuple[Any, Any], folder: Path, **grpo: Any) -> list[dict[str, Any]]:
    with training.temporary_adapter(loaded[0]) as policy:
        values = {"max_steps": 2, "max_completion_length": 24, **grpo}
        trainer = training.make_trainer(policy, loaded[1], folder, **values)
        trainer.train()
        return training.logged_steps(trainer)


@pytest.mark.parametrize("name", OPTIONS)
def test_engine_and_trainer_logprobs_differ_only_by_rounding(loaded, tmp_path, name) -> None:
    rows = train_run(loaded, tmp_path, **OPTIONS[name])
    assert len(rows) == 2
    for row in rows:
        assert row["sampling/logp_gap_max"] < TOLERANCE
        # The ratio is logged only in steps with a new rollout.
        assert row.get(RATIO_METRIC, 1.0) == pytest.approx(1, abs=1e-3)
        assert row["entropy"] > 0
    if "beta" in OPTIONS[name]:  # a new adapter equals the reference, also with truncation
        assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)


def test_truncation_keeps_the_size_of_the_gradient(loaded, tmp_path) -> None:
    """On a nearly uniform distribution, the probability mass that truncation keeps approaches 0
    over a completion.
    """
    nearly_uniform = {"temperature": 2.0, "learning_rate": 1e-4}
    norms = {
        name: [
            row["grad_norm"]
            for row in train_run(loaded, tmp_path / name, **nearly_uniform, **options)
        ]
        for name, options in {"all": {}, "top_p": {"top_p": 0.9}, "top_k": {"top_k": 10}}.items()
    }
    for name in ("top_p", "top_k"):
        for truncated, untruncated in zip(norms[name], norms["all"], strict=True):
            assert untruncated / 4 < truncated < untruncated * 4, norms


def test_collapsed_importance_weights_give_one_warning(loaded, tmp_path) -> None:
    """Only two tokens are allowed: each importance weight is the probability mass of these two."""
    kwargs = {"allowed_token_ids": [3, 4]}
    with pytest.warns(ToolkitWarning, match="mean importance weight is") as caught:
        rows = train_run(loaded, tmp_path, generation_kwargs=kwargs, max_steps=3)
    assert all(row[RATIO_METRIC] < 0.1 for row in rows)
    messages = [
        str(warning.message) for warning in caught if issubclass(warning.category, ToolkitWarning)
    ]
    assert len(messages) == 1
    assert "Remove allowed_token_ids, which the training pass cannot apply" in messages[0]


def test_rollouts_without_the_adapter_give_one_warning(loaded, tmp_path, monkeypatch) -> None:
    """The engine samples from the base model instead of the policy, as if the adapter had not been
    published. The logged gap is large at every step, and the run warns once.
    """

    def mean_gaps(folder: Path) -> list[float]:
        with training.temporary_adapter(loaded[0], init_lora_weights=False) as policy:
            trainer = training.make_trainer(policy, loaded[1], folder, max_steps=2)
            trainer.train()
            return [row["sampling/logp_gap_mean"] for row in training.logged_steps(trainer)]

    assert max(mean_gaps(tmp_path / "published")) < TOLERANCE  # a warning would be an error
    engine = loaded[0].toolkit_engine
    make_request = engine._adapter_request
    monkeypatch.setattr(engine, "_adapter_request", lambda _: make_request(False))
    with pytest.warns(ToolkitWarning, match="the engine may sample without the adapter") as caught:
        base_gaps = mean_gaps(tmp_path / "base")
    assert min(base_gaps) > 0.02 > 1000 * TOLERANCE
    assert len([warning for warning in caught if issubclass(warning.category, ToolkitWarning)]) == 1


def test_penalties_of_one_turn_are_refused_with_tools(loaded, tmp_path) -> None:
    kwargs, more = {"presence_penalty": 0.5}, {"tools": [len]}
    with (
        training.temporary_adapter(loaded[0]) as policy,
        pytest.raises(ConfigValueError, match="presence_penalty counts the tokens of one turn"),
    ):
        training.make_trainer(
            policy, loaded[1], tmp_path, trainer_arguments=more, generation_kwargs=kwargs
        )


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"max_new_token": 30},
            r"max_new_token is not a sampling keyword.*\n.*max_completion_length",
        ),
        ({"temperature": 0}, "temperature has the same meaning as grpo.temperature"),
        ({"stop_strings": ["a"]}, r"does not read it\n.*use stop"),
        ({"presence_penalty": 9.0}, "9.0 is not a number from -2 to 2"),
        ({"seed": 1}, "seed is set by the toolkit"),
    ],
)
def test_invalid_generation_kwargs_are_refused(loaded, tmp_path, kwargs, message) -> None:
    with (
        training.temporary_adapter(loaded[0]) as policy,
        pytest.raises(ConfigValueError, match=message),
    ):
        training.make_trainer(policy, loaded[1], tmp_path, generation_kwargs=kwargs)
