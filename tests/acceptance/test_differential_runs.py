"""``validate`` and ``train`` agree on run files made from the schema, for one step of tiny models.

If validate accepts a run file, the run ends with exit code 0 and a row of metrics, or with the name
of a key and an exit code other than 3 and 70. If train refuses a key, validate must have reported
the key, either without facts about the machine or for a machine without a GPU.
"""

from __future__ import annotations

import random
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import pytest
from spoiled_world import FinishedCommand, make_world, run_commands

from toolkit.config.document_loader import load_document
from toolkit.config.resolved import DeviceFacts, Situation
from toolkit.config.source import dotted
from toolkit.config.validate import validate

for beside in ("fixtures", "engine"):
    sys.path.append(str(Path(__file__).resolve().parents[1] / beside))
from run_generator import GeneratedRun, all_keys, generate, make_models  # noqa: E402 - needs both folders in sys.path

if TYPE_CHECKING:
    from collections.abc import Iterator

SAMPLE = 5
LANES = 2
CHUNK = 6
LIMIT_S = 300
PARTS = 16
KEYS = (*all_keys(), "model.model_name", "runtime.engine")
# Keys of model and lora are arguments of the drop-in API too. Its errors omit the section.
NAMES = [key.partition(".")[2] for key in KEYS if re.match("(model|lora).*_", key)]
KEY = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in (*KEYS, *NAMES)))
WITHOUT_A_GPU = Situation(device=DeviceFacts("no GPU", None))

REWARD = """\
def score(completions, answer, **kwargs):
    return [float(len(set(str(text)))) for text in completions]
"""

EXCEPTIONS: dict[str, str] = {
    "a prompt cannot be shortened to grpo.max_prompt_length": "only the tokenizer can count the"
    " tokens of a chat template, and validate does not load the tokenizer",
    "tokens, but the engine supports": "only the tokenizer can count the tokens of a prompt, and"
    " validate does not load the tokenizer",
    "reward score took longer": "validate does not call the reward function",
    "contains no weights": "a folder with config.json alone can be judged and sized, so validate"
    " accepts it; envcheck check refuses it",
}
"""Parts of errors of train, each with the reason why validate does not report the error."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_models(tmp_path_factory.mktemp("models"))


class Case:
    """A run file in its own folder, and the findings of validate for it."""

    def __init__(self, folder: Path, made: GeneratedRun, model: Path) -> None:
        self.made, self.folder = made, make_world(folder, model)
        rows = (folder / "train.jsonl").read_text()
        (folder / "eval.jsonl").write_text(rows)
        (folder / "mine.py").write_text(REWARD)
        (folder / "run.yaml").write_text(made.text())
        document = load_document(folder / "run.yaml")
        plain, here = validate(document), validate(document, WITHOUT_A_GPU)
        self.accepted = plain.ok
        self.reported_keys = {dotted(one.path) for one in (*plain.findings, *here.findings)}

    def as_command(self) -> dict[str, Any]:
        return {"folder": self.folder, "arguments": ["train", "run.yaml"], "limit_s": LIMIT_S}

    def fault(self, end: FinishedCommand) -> str | None:
        """The fault of the ended run, or None."""
        stderr_end = end.stderr.strip()[-900:]
        if end.returncode == 0:
            return None if any("loss" in row for row in end.rows()) else "exit 0 without a loss"
        if end.returncode in (70, 3) or end.returncode < 0 or not KEY.search(end.stderr):
            return f"exit {end.returncode}: {stderr_end}"
        bare = {
            key.partition(".")[2] for key in self.reported_keys if re.match("(model|lora).*_", key)
        }
        if any(text in end.stderr for text in (*self.reported_keys, *bare, *EXCEPTIONS)):
            return None
        return f"exit {end.returncode}, but validate did not report the key: {stderr_end}"


def find_faults(
    root: Path, models: dict[str, Path], made: list[GeneratedRun], lanes: int = 1
) -> list[str]:
    """Run the run files that validate accepts, and return the faults of these runs."""
    cases = [Case(root / str(i), one, models[one.model]) for i, one in enumerate(made)]
    accepted = [case for case in cases if case.accepted]
    return sorted(
        f"{case.folder.name} {case.made.description}\n    {wrong}"
        for case, end in _run_cases(accepted, lanes)
        if (wrong := case.fault(end)) is not None
    )


def _run_cases(cases: list[Case], lanes: int) -> Iterator[tuple[Case, FinishedCommand]]:
    """Run the commands with one command server per lane. Runs with vLLM have other servers."""
    for engine in (True, False):
        wanted = [case for case in cases if _uses_vllm(case.made) is engine]
        chunks: SimpleQueue[list[Case]] = SimpleQueue()
        for start in range(0, len(wanted), CHUNK):
            chunks.put(wanted[start : start + CHUNK])
        modules = ("toolkit.engine.start",) if engine else ()
        with ThreadPoolExecutor(lanes) as pool:
            for found in pool.map(_run_lane, range(lanes), [chunks] * lanes, [modules] * lanes):
                yield from found


def _run_lane(
    lane: int, chunks: SimpleQueue[list[Case]], modules: tuple[str, ...]
) -> list[tuple[Case, FinishedCommand]]:
    found: list[tuple[Case, FinishedCommand]] = []
    while True:
        try:
            cases = chunks.get_nowait()
        except Empty:
            return found
        commands = [case.as_command() for case in cases]
        found += zip(cases, run_commands(commands, *modules, lane=lane), strict=True)


def _uses_vllm(made: GeneratedRun) -> bool:
    return made.engine == "vllm" or ("model.fast_inference", True) in made.sets


def test_enough_run_files_are_generated() -> None:
    made = generate()
    assert len(made) >= 600
    assert made == generate()


def test_validate_and_train_agree_on_a_sample_of_runs(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    made = [one for one in generate() if not _uses_vllm(one)]
    wrong = find_faults(tmp_path, models, random.Random(12).sample(made, SAMPLE))
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_validate_and_train_agree_on_every_run(
    tmp_path: Path, models: dict[str, Path], part: int
) -> None:
    wrong = find_faults(tmp_path, models, generate()[part::PARTS], LANES)
    assert not wrong, "\n".join(wrong)
