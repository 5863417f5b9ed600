"""Bad input to ``toolkit train``: the command ends with the documented exit code and one error
message, which says what is wrong, where, and what to do. There is no traceback, and files that
were written before the error are kept.

Most cases run in forks of one process that has imported the libraries (command_server.py).
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import tarfile
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file, save_file
from spoiled_world import (
    TOOLKIT,
    FinishedCommand,
    command_environment,
    make_model,
    make_world,
    run_commands,
    run_toolkit,
    unprivileged_prefix,
)

from toolkit.train.checkpointing import checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.thorough

CANARY = "a canary that sings"


@dataclass(frozen=True)
class Case:
    """``spoil`` makes the input bad. The command must end with ``code`` and print ``messages``."""

    code: int
    messages: tuple[str, ...]
    spoil: Callable[[Path], Any] = lambda folder: None
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)
    arguments: tuple[str, ...] = ("train", "run.yaml")
    permissions: bool = False


def _write(name: str, content: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(content)


def _reward(body: str) -> Callable[[Path], Any]:
    return _write("mine.py", f"import os, time\ndef score(completions, **kwargs):\n    {body}\n")


def _no_checkpoint(folder: Path) -> None:
    (folder / "other").mkdir()
    (folder / "other" / "readme.txt").write_text("not a model")


def _without_a_tensor(folder: Path) -> None:
    """Make a model that cannot be loaded. If another error is reported, its check ran earlier."""
    shutil.copytree(folder / "model", folder / "broken")
    weights = folder / "broken" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.norm.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})


def _archive(folder: Path) -> None:
    with tarfile.open(folder / "evil.tar.gz", "w:gz") as tar:
        info = tarfile.TarInfo("../evil.jsonl")
        tar.addfile(info, io.BytesIO(b""))


def _unreadable(folder: Path) -> None:
    (folder / "train.jsonl").chmod(0)


def _read_only(folder: Path) -> None:
    (folder / "closed").mkdir(mode=0o555)


CASES = {
    "no run file": Case(2, ("gone.yaml",), arguments=("train", "gone.yaml")),
    "run file of bytes": Case(2, ("run.yaml",), lambda f: (f / "run.yaml").write_bytes(b"\xff\0")),
    "no data file": Case(2, ("gone.jsonl",), changes={"dataset": {"path": "gone.jsonl"}}),
    "no data file and a broken model": Case(2, ("gone.jsonl",), _without_a_tensor,
        changes={"dataset": {"path": "gone.jsonl"}, "model": {"model_name": "broken"}}),
    "unreadable data": Case(1, ("train.jsonl", "ermission"), _unreadable, permissions=True),
    "broken line": Case(
        1, ("train.jsonl line 2", "is not JSON"), _write("train.jsonl", '{"a": 1}\n{"a": 2')
    ),
    "empty dataset": Case(1, ("train.jsonl has no rows",), _write("train.jsonl", "\n")),
    "prompt longer than the model's sequences": Case(
        0,
        (),
        _write("train.jsonl", f'{{"question": "{"7" * 3000}", "answer": "2"}}\n' * 8),
    ),
    "column of two types": Case(
        1,
        ("train.jsonl line 2: column 'answer' has a text in this row and a number in", "DATA040"),
        _write("train.jsonl", '{"question": "1", "answer": 1}\n{"question": "2", "answer": "2"}'),
    ),
    "missing column": Case(
        1, ("questions", "question, answer"), changes={"dataset": {"prompt": "questions"}}
    ),
    "archive that leads outside": Case(
        1, ("../evil.jsonl", "outside"), _archive, changes={"dataset": {"path": "evil.tar.gz"}}
    ),
    "no checkpoint": Case(
        1,
        ("other has no readable config.json",),
        _no_checkpoint,
        changes={"model": {"model_name": "other"}},
    ),
    "no such model": Case(1, ("/gone", "does not"), changes={"model": {"model_name": "./gone"}}),
    "code not allowed": Case(
        1, ("mine:score", "allow_code"), changes={"runtime": {"allow_code": ["yours"]}}
    ),
    "raising reward": Case(
        1,
        ("reward score raised ValueError", "mine.py:3", "sample 0 of 4", "out/bad_rewards.jsonl"),
        _reward("raise ValueError('my key is ' + os.environ['MY_API_KEY'])"),
    ),
    "reward of a wrong length": Case(
        1, ("reward score returned 3 rewards for 4",), _reward("return [1.0] * 3")
    ),
    "folder in the way": Case(
        1,
        ("run.yaml/x", "output_dir", "Traceback"),
        changes={"runtime": {"output_dir": "run.yaml/x"}},
        arguments=("train", "run.yaml", "--debug"),
    ),
    "read-only folder": Case(
        1,
        ("closed", "ermission", "output_dir"),
        _read_only,
        changes={"runtime": {"output_dir": "closed/out"}},
        permissions=True,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def results(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, FinishedCommand]:
    """The results of all cases that do not depend on file permissions."""
    root = tmp_path_factory.mktemp("cases")
    names = [name for name, case in CASES.items() if not case.permissions]
    cases = []
    for name in names:
        case = CASES[name]
        folder = make_world(root / name.replace(" ", "-"), model, **case.changes)
        case.spoil(folder)
        arguments = list(case.arguments)
        cases.append({"folder": folder, "arguments": arguments, "env": {"MY_API_KEY": CANARY}})
    return dict(zip(names, run_commands(cases), strict=True))


@pytest.mark.parametrize("name", [name for name in CASES if not CASES[name].permissions])
def test_bad_input_ends_with_an_error_message(
    results: dict[str, FinishedCommand], name: str
) -> None:
    _check(CASES[name], results[name])


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].permissions])
def test_missing_permissions_end_with_an_error_message(
    model: Path, tmp_path: Path, name: str
) -> None:
    prefix = unprivileged_prefix()
    if prefix is None:
        pytest.skip("the user is root, and setpriv cannot drop the override of file permissions")
    folder = make_world(tmp_path / "w", model, **CASES[name].changes)
    CASES[name].spoil(folder)
    _check(CASES[name], run_toolkit(folder, *CASES[name].arguments, before=prefix))


def _check(case: Case, shown: FinishedCommand | subprocess.CompletedProcess[str]) -> None:
    assert shown.returncode == case.code, shown.stderr
    for message in case.messages:
        assert message in shown.stderr
    assert ("Traceback" in shown.stdout + shown.stderr) is ("--debug" in case.arguments)
    assert CANARY not in shown.stdout + shown.stderr


def test_prompts_are_shortened_so_that_a_completion_has_room(results) -> None:
    stdout = results["prompt longer than the model's sequences"].stdout
    assert "8 prompts were longer than grpo.max_prompt_length" in stdout
    assert "the longest had 3000 tokens" in stdout


def test_the_sample_of_a_failing_reward_is_saved(results) -> None:
    folder = results["raising reward"].folder
    text = (folder / "out" / "bad_rewards.jsonl").read_text()
    record = json.loads(text)
    assert record["prompt"].endswith("=")
    assert "[redacted: MY_API_KEY]" in record["problem"]
    assert CANARY not in text


def test_an_archive_unpacks_nothing_outside_its_folder(results) -> None:
    folder = results["archive that leads outside"].folder
    assert list(folder.parent.rglob("evil.jsonl")) == []


def test_ctrl_c_saves_a_checkpoint(model: Path, tmp_path: Path) -> None:
    folder = make_world(tmp_path / "w", model, grpo={"max_steps": 10_000, "save_steps": 5_000})
    process = subprocess.Popen(
        [str(TOOLKIT), "train", "run.yaml"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=command_environment(PYTHONUNBUFFERED="1"),
    )
    metrics = folder / "out" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "stopped by SIGINT" in err
    assert "Traceback" not in out + err
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert (folder / "out" / f"checkpoint-{len(rows)}").is_dir()


FILLS = """\
import os, pathlib

def score(completions, trainer_state, **kwargs):
    if trainer_state.global_step == 3:
        with open(pathlib.Path(os.environ["SMALL"]) / "filler", "wb", buffering=0) as filler:
            for size in (1 << 20, 1):
                try:
                    while True:
                        filler.write(bytes(size))
                except OSError:
                    pass
    return [float(len(set(text))) for text in completions]
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A separate file system that is large enough for the pre-flight check."""
    mount_point = tmp_path / "small"
    mount_point.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1100m", "tmpfs", str(mount_point)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield mount_point
    subprocess.run(["umount", "-l", str(mount_point)], check=True)


def test_a_full_disk_keeps_the_last_checkpoint(
    model: Path, tmp_path: Path, small_disk: Path
) -> None:
    folder = make_world(
        tmp_path / "w",
        model,
        grpo={"max_steps": 6, "save_steps": 1},
        runtime={"output_dir": str(small_disk / "out")},
    )
    (folder / "mine.py").write_text(FILLS)
    shown = run_toolkit(folder, "train", "run.yaml", env={"SMALL": str(small_disk)})
    assert shown.returncode == 1, shown.stderr
    assert "the disk is full" in shown.stderr
    assert "Traceback" not in shown.stdout + shown.stderr
    (small_disk / "filler").unlink()
    assert checkpoint.find_faults(small_disk / "out" / "checkpoint-3") == []
    assert not (small_disk / "out" / "checkpoint-4").exists()
