"""Seeds of rollouts, checks of their prompts and options, and conversion of vLLM's errors."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.base.errors import ConfigError, ConfigValueError, NodeError, RetryError
from toolkit.engine.rollout_request import (
    SEED_LIMIT,
    Rollout,
    Sampling,
    check_prompts,
    derive_seed,
    request_seed,
)
from toolkit.engine.vllm_errors import to_toolkit_error


@given(st.integers(0, 2**62), st.integers(0, 10_000))
def test_request_seeds_fit_a_signed_64_bit_integer(seed: int, index: int) -> None:
    assert 0 <= request_seed(seed, index) < SEED_LIMIT + 10_001 < 2**63
    assert request_seed(seed, index) == request_seed(seed, index)


def test_neighbouring_rows_steps_and_runs_do_not_overlap() -> None:
    batches = [(run, step) for run in (1, 2) for step in (1, 2)]
    used = {request_seed(derive_seed(*batch), row) for batch in batches for row in range(2048)}
    assert len(used) == len(batches) * 2048
    assert {request_seed(seed, row) for seed in (0, 1) for row in (0, 1)} == {
        request_seed(0, 0),
        request_seed(0, 0) + 1,  # vLLM adds 1 per completion of one request
        request_seed(1, 0),
        request_seed(1, 0) + 1,
    }
    assert derive_seed(1, 12) != derive_seed(11, 2)
    assert derive_seed(1, 2, 0) != derive_seed(1, 2, 1)


def test_seeds_are_the_same_on_every_machine() -> None:
    assert derive_seed(42, 7) == 4140752993874206638
    assert request_seed(derive_seed(42, 7), 3) == 2554502317488962932


@pytest.mark.parametrize(
    "bad",
    [{"n": 0}, {"max_tokens": 0}, *({"extra": {name: 2}} for name in ("seed", "n", "logprobs"))],
)
def test_sampling_refuses_values_that_break_the_layout(bad: dict) -> None:
    with pytest.raises(ConfigValueError):
        Sampling(**bad)


def test_empty_and_too_long_prompts_are_refused() -> None:
    check_prompts([[1], [2, 3]], 5, 3)
    with pytest.raises(ConfigValueError, match="prompt 1 has 3 tokens"):
        check_prompts([[1], [2, 3, 4]], 5, 3)
    with pytest.raises(ConfigValueError, match="prompt 0 has no tokens"):
        check_prompts([[]], 5, 3)


def test_rollout_has_the_order_in_which_trl_unpacks_it() -> None:
    prompts, completions, logprobs, tokens = Rollout([[1]], [[2]], [[[-0.5]]], [[[2]]]).as_tuple()
    assert (prompts, completions, logprobs, tokens) == ([[1]], [[2]], [[[-0.5]]], [[[2]]])


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (
            "Free memory on device cuda:0 (3.2/79.1 GiB) on startup is less than desired GPU memory"
            " utilization (0.9, 71.2 GiB). Decrease GPU memory utilization",
            RetryError,
        ),
        (
            "No available memory for the cache blocks. Try increasing `gpu_memory_utilization`",
            ConfigError,
        ),
        ("Error 802: system not yet initialized", NodeError),
    ],
)
def test_the_error_of_a_known_failure_names_its_check(text: str, kind: type) -> None:
    converted = to_toolkit_error(RuntimeError(text), "the engine did not start")
    assert type(converted) is kind
    assert converted.where is not None
    assert converted.where.startswith("check ")
    assert converted.fix


def test_an_error_without_a_message_names_its_source_line() -> None:
    """A failed assertion of vLLM often has no text."""
    try:
        raise AssertionError
    except AssertionError as error:
        converted = to_toolkit_error(error, "the engine did not start")
    assert "AssertionError without a message, raised at " in converted.message
    assert f"{Path(__file__).name}:" in converted.message
    assert to_toolkit_error(AssertionError(), "start").message == "start: AssertionError"


def test_an_unknown_failure_is_quoted_and_its_cause_is_read() -> None:
    outer = RuntimeError("Engine core initialization failed")
    outer.__cause__ = RuntimeError("No available memory for the cache blocks.")
    assert isinstance(to_toolkit_error(outer, "start"), ConfigError)
    converted = to_toolkit_error(RuntimeError("boom\nlong tail"), "the rollout failed")
    assert type(converted) is NodeError
    assert converted.message == "the rollout failed: RuntimeError: boom"
    assert type(to_toolkit_error(ValueError("dtype foo"), "start")) is ConfigError
    missing = to_toolkit_error(
        AssertionError("Attempted to load weight (a) into parameter (b)"), "start"
    )
    assert (type(missing), missing.where) == (ConfigError, "check model.weights")
    assert to_toolkit_error(RuntimeError(), "start").message == "start: RuntimeError"
