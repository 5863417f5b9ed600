"""In a job of several processes, `envcheck check --config` uses the world size of the job."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from toolkit.base.errors import ConfigError
from toolkit.cli import check_request

if TYPE_CHECKING:
    from pathlib import Path


def test_groups_may_span_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n')
    run = {
        "model": {"model_name": "m"},
        "dataset": {"path": "train.jsonl", "prompt": "question", "answer": "answer"},
        "reward": {"functions": [{"name": "numeric_match"}]},
        "grpo": {"per_device_train_batch_size": 1, "num_generations": 8},
    }
    path = tmp_path / "run.json"
    path.write_text(json.dumps(run))
    with pytest.raises(ConfigError, match="batch of 1 completions is not a multiple of 8"):
        check_request._load_run(path, ())
    monkeypatch.setenv("WORLD_SIZE", "8")
    _, run = check_request._load_run(path, ())
    assert run.grpo["num_generations"] == 8


def test_every_form_of_a_requirement_is_parsed() -> None:
    """A compute capability can have no minor version. A driver version has any number of parts."""
    values = check_request.parse_requirements(
        ["cc>=9", "free >= 1.5 GiB", "driver>=580.65.06", "2"]
    )
    assert values == {
        "required_capability": (9, 0),
        "required_free_bytes": 3 << 29,
        "required_driver": "580.65.06",
        "required_gpus": 2,
    }
    with pytest.raises(ConfigError) as refused:
        check_request.parse_requirements(["h300"])
    assert refused.value.where == "--require"
