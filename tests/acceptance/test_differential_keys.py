"""``validate`` and ``train`` agree on the values of single grpo keys, for one step of a tiny model.

If validate accepts a run, the run ends with exit code 0 and a row of metrics, or with exit code 1
and the name of a key. If train refuses the key, validate must have warned about the key. There are
such warnings for a missing package and for a metric that a user's own reward may log.
"""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING

import pytest
from differential_keys import overrides, runs
from spoiled_world import FinishedCommand, make_model, make_world, run_commands

from toolkit.config.document_loader import load_document
from toolkit.config.source import dotted
from toolkit.config.validate import validate

if TYPE_CHECKING:
    from pathlib import Path

SAMPLE = 4
# These errors depend on the machine: without --gpu, validate does not know if there is a GPU.
WITHOUT_A_GPU = re.compile(r"grpo\.(tf32|cache_implementation)\b.*there is no GPU")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("keys")
    model = make_model(root)
    folder = make_world(root / "world", model, grpo={"max_steps": 1})
    (folder / "eval.jsonl").write_text((folder / "train.jsonl").read_text())
    return folder


def find_faults(world: Path, lines: list[str]) -> list[str]:
    """Run the lines that validate accepts, and return the faults of these runs."""
    accepted: list[tuple[str, set[str]]] = []
    for line in lines:
        outcome = validate(load_document(world / "run.yaml", overrides(line)))
        if outcome.ok:
            accepted.append((line, {dotted(found.path) for found in outcome.findings}))
    cases = []
    for number, (line, _) in enumerate(accepted):
        folder = make_world(world.parent / f"{len(lines)}-{number}", world / "model")
        for name in ("run.yaml", "eval.jsonl"):
            (folder / name).write_text((world / name).read_text())
        sets = [part for one in overrides(line) for part in ("--set", one)]
        cases.append({"folder": folder, "arguments": ["train", "run.yaml", *sets]})
    faults = [
        (line, fault(end, warned))
        for (line, warned), end in zip(accepted, run_commands(cases), strict=True)
    ]
    return [f"{line}: {wrong}" for line, wrong in faults if wrong is not None]


def fault(end: FinishedCommand, warned: set[str]) -> str | None:
    """The fault of an ended run, or None. ``warned`` are the keys of validate's warnings."""
    if end.returncode == 0:
        return None if any("loss" in row for row in end.rows()) else "exit 0 without a loss"
    if end.returncode != 1 or "grpo." not in end.stderr:
        return f"exit {end.returncode}, {end.stderr}"
    if any(key in end.stderr for key in warned) or WITHOUT_A_GPU.search(end.stderr):
        return None
    return f"validate did not warn about the key: {end.stderr}"


@pytest.mark.thorough
def test_validate_and_train_agree_on_a_sample_of_keys(world: Path) -> None:
    assert find_faults(world, random.Random(12).sample(runs(), SAMPLE)) == []


@pytest.mark.slow
def test_validate_and_train_agree_on_every_key(world: Path) -> None:
    assert find_faults(world, runs()) == []
