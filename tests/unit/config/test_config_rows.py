"""Rule GRPO043 compares the number of rows with the prompts of a generation batch. These tests have
cases that the fixtures do not have.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from toolkit.config.document_loader import load_document
from toolkit.config.rules import Situation
from toolkit.config.validate import validate

if TYPE_CHECKING:
    from pathlib import Path

    from toolkit.config.finding import Finding


def row_findings(
    folder: Path, world_size: int = 1, rows: int | None = 12, **changes: Any
) -> list[Finding]:
    """The findings of GRPO043 for a dataset with ``rows`` rows. None means that the dataset is not
    on this machine.
    """
    if rows is not None:
        lines = [json.dumps({"question": str(n), "answer": str(n)}) for n in range(rows)]
        (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    run: dict[str, dict[str, Any]] = {
        "model": {"model_name": "m"},
        "dataset": {
            "path": "train.jsonl" if rows is not None else "me/data",
            "prompt": "question",
            "answer": "answer",
        },
        "reward": {"functions": [{"name": "exact_match"}]},
        "grpo": {"per_device_train_batch_size": 4, "num_generations": 4},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        run[section][name] = value
    (folder / "run.yaml").write_text(json.dumps(run))
    outcome = validate(load_document(folder / "run.yaml"), Situation(world_size=world_size))
    return [finding for finding in outcome.findings if finding.rule == "GRPO043"]


@pytest.mark.parametrize(
    ("world_size", "steps", "is_refused"),
    [(1, 12, False), (1, 13, True), (2, 6, False), (2, 7, True), (13, 1, True)],
)
def test_every_process_needs_rows_for_its_prompts(tmp_path, world_size, steps, is_refused) -> None:
    findings = row_findings(tmp_path, world_size, grpo__gradient_accumulation_steps=steps)
    assert bool(findings) is is_refused


def test_only_a_limit_counts_if_the_data_is_elsewhere(tmp_path) -> None:
    assert row_findings(tmp_path, rows=None, grpo__gradient_accumulation_steps=1000) == []
    (finding,) = row_findings(
        tmp_path, rows=None, grpo__gradient_accumulation_steps=8, dataset__limit=5
    )
    assert finding.path == ("dataset", "limit")
    assert [fix.text for fix in finding.fixes][-1] == "limit: 8"


@pytest.mark.parametrize(
    "grpo",
    [
        {"gradient_accumulation_steps": 50},
        {"steps_per_generation": 50},
        {"generation_batch_size": 200},
        {"generation_batch_size": 200, "num_generations": 8, "per_device_train_batch_size": 10},
    ],
)
def test_the_first_fix_is_the_largest_batch_that_the_rows_fill(tmp_path, grpo) -> None:
    changes = {f"grpo__{name}": value for name, value in grpo.items()}
    (finding,) = row_findings(tmp_path, **changes)
    name, _, value = finding.fixes[0].text.partition(": ")
    assert row_findings(tmp_path, **{**changes, f"grpo__{name}": int(value)}) == []
    larger = int(value) + (1 if "steps" in name else 40)
    assert row_findings(tmp_path, **{**changes, f"grpo__{name}": larger}) != []


def test_no_fix_is_offered_if_the_rows_fill_no_group(tmp_path) -> None:
    (finding,) = row_findings(tmp_path, rows=1, grpo__per_device_train_batch_size=8)
    assert finding.fixes == ()
