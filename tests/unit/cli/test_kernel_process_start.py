"""``toolkit train`` starts the process that compiles kernels before it imports its libraries."""

from __future__ import annotations

from typing import Any

import pytest

from toolkit.cli import train_run
from toolkit.config.run_config import ModelSection, RunConfig, RuntimeSection
from toolkit.engine import kernel_process
from toolkit.train import logging_setup


class Stop(Exception):
    """Raised in place of the rest of the run."""


@pytest.mark.parametrize(
    ("engine", "fast_inference", "expected"),
    [
        ("auto", "auto", ["started"]),
        ("vllm", True, ["started"]),
        ("transformers", "auto", []),
        ("auto", False, []),
        ("vllm", False, ["started"]),  # runtime.engine decides
    ],
)
def test_a_run_with_vllm_starts_the_process_first(
    engine: Any, fast_inference: Any, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def stop(_config: RunConfig) -> None:
        raise Stop

    monkeypatch.setattr(logging_setup, "prepare_environment", lambda: None)
    monkeypatch.setattr(kernel_process, "start", lambda: calls.append("started"))
    monkeypatch.setattr(train_run, "_read_weights_ahead", stop)
    config = RunConfig(
        model=ModelSection(model_name="any", fast_inference=fast_inference),
        runtime=RuntimeSection(engine=engine),
    )
    with pytest.raises(Stop):
        train_run._train(config, lambda _: None, evaluate=None, debug=False)
    assert calls == expected
