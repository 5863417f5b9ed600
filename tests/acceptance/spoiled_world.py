"""A folder in which ``toolkit train run.yaml`` succeeds until a test changes a file of it, and
functions that run the command there.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

TOOLKIT = Path(sys.executable).parent / "toolkit"
ENVCHECK = Path(sys.executable).parent / "envcheck"
FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"

RUN: dict[str, Any] = {
    "model": {"model_name": "model", "max_seq_length": 64, "dtype": "float32"},
    "lora": {"r": 4, "lora_alpha": 8, "use_gradient_checkpointing": False},
    "dataset": {"path": "train.jsonl", "prompt": "question", "answer": "answer"},
    "reward": {"functions": [{"name": "mine:score"}]},
    "grpo": {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 4,
        "learning_rate": 0.001,
    },
    "runtime": {"engine": "transformers", "output_dir": "out", "allow_code": ["mine"]},
}
SCORE = """\
def score(completions, answer, **kwargs):
    return [float(len(set(text))) for text in completions]
"""


def make_model(folder: Path) -> Path:
    """Make the model that all folders of a test module share."""
    sys.path.append(str(FIXTURES))
    from tiny_llama import make_tiny

    return make_tiny(folder / "shared-model")


def make_world(folder: Path, checkpoint: Path, **changes: dict[str, Any]) -> Path:
    """Write run.yaml (JSON is valid YAML), a dataset, a reward module and a link to the model.

    ``changes`` are keys of sections of the run file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model").symlink_to(checkpoint)
    run = {name: {**section, **changes.get(name, {})} for name, section in RUN.items()}
    (folder / "run.yaml").write_text(json.dumps(run, indent=2))
    rows = [{"question": f"{i}+{i + 1}=", "answer": str(2 * i + 1)} for i in range(16)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.py").write_text(SCORE)
    return folder


def command_environment(**extra: str) -> dict[str, str]:
    """The environment of a command: one thread, and no access to the Hugging Face Hub."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **extra}


def run_toolkit(
    folder: Path, *arguments: str, before: tuple[str, ...] = (), **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run ``toolkit`` in ``folder``. ``before`` is a prefix of the command, such as setpriv."""
    return subprocess.run(
        [*before, str(TOOLKIT), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=command_environment(**options.pop("env", {})),
        **options,
    )


@dataclass
class FinishedCommand:
    """A command that ran in ``folder``."""

    folder: Path
    returncode: int
    stdout: str
    stderr: str

    def rows(self, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
        """The rows of a log file of the run."""
        return [json.loads(line) for line in (self.folder / "out" / name).read_text().splitlines()]


def run_commands(cases: list[dict[str, Any]], *more: str, lane: int = 0) -> list[FinishedCommand]:
    """Run each case ({folder, arguments, env}) with the entry point of ``toolkit``.

    Each case runs in a fork of a process that has imported the heavy libraries and the modules
    ``more``. Each ``lane`` has its own such process, so that several threads can run cases. A case
    with ``limit_s`` is killed after that many seconds.
    """
    requests = [
        {**case, "folder": str(case["folder"]), "env": command_environment(**case.get("env", {}))}
        for case in cases
    ]
    server = _server(*more, lane=lane)
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(requests) + "\n")
    server.stdin.flush()
    codes = json.loads(server.stdout.readline())
    finished = []
    for case, code in zip(cases, codes, strict=True):
        texts = ((case["folder"] / name).read_text() for name in ("stdout", "stderr"))
        finished.append(FinishedCommand(case["folder"], code, *texts))
    return finished


@cache
def _server(*more: str, lane: int) -> subprocess.Popen[str]:
    """Start the command server of a lane, once for all modules of a test session."""
    script = Path(__file__).with_name("command_server.py")
    server = subprocess.Popen(
        [sys.executable, str(script), *more],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=command_environment(),
    )

    def end() -> None:
        server.communicate()  # closes the server's standard input, and then the server ends

    atexit.register(end)
    return server


def unprivileged_prefix() -> tuple[str, ...] | None:
    """The command prefix with which file permissions also apply to root.

    It is () if this user is not root, and None if setpriv is missing or fails.
    """
    if os.geteuid() != 0:
        return ()
    prefix = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search")
    if shutil.which("setpriv") is None:
        return None
    made = subprocess.run([*prefix, "true"], capture_output=True, check=False)
    return prefix if made.returncode == 0 else None
