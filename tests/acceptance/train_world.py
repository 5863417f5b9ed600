"""Files of a run that trains in seconds (an untrained model, 24 prompts, a reward), and functions
that start such a run in a subprocess or a fork.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RUN_FILE = """\
model: {{model_name: model, max_seq_length: 16, dtype: float32, max_lora_rank: 8}}
lora: {{r: 4, lora_alpha: 8, use_gradient_checkpointing: false, random_state: 5}}
dataset: {{path: train.jsonl, eval_path: eval.jsonl, prompt: question, answer: answer}}
reward: {{functions: [{{name: "my_rewards:ones"}}, {{name: exact_match, weight: 0.5}}]}}
grpo:
  max_steps: {steps}
  per_device_train_batch_size: 8
  num_generations: 4
  max_prompt_length: 8
  max_completion_length: 4
  learning_rate: 0.01
  save_steps: 2
  seed: 3
runtime: {{engine: {engine}, output_dir: run, allow_code: [my_rewards]}}
"""
REWARDS = """\
def ones(completions, **_):
    return [c.count("1") / max(1, len(c)) for c in completions]
"""
BIN = Path(sys.executable).parent


def make_run_files(folder: Path, *, engine: str = "transformers", steps: int = 8) -> Path:
    """Write the model, the datasets, the reward and the run file; return the run file's path."""
    from toolkit.train.demo import make_model, make_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    make_model(7).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    pairs = [(a, b) for a in range(10, 14) for b in range(10, 16)]
    for name, rows in (("train.jsonl", pairs), ("eval.jsonl", pairs[:6])):
        lines = [json.dumps({"question": f"{a}+{b}=", "answer": str(a + b)}) for a, b in rows]
        (folder / name).write_text("\n".join(lines) + "\n")
    (folder / "my_rewards.py").write_text(REWARDS)
    run_file = folder / "run.yaml"
    run_file.write_text(RUN_FILE.format(engine=engine, steps=steps))
    return run_file


def command_environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CI": "1", **more}


def run_toolkit(
    *arguments: str, timeout: float = 300, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run the installed command to its end."""
    return subprocess.run(
        [BIN / "toolkit", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=command_environment(**more),
        check=False,
    )


def result_digests(run_dir: Path) -> dict[str, str]:
    """Digests of the adapter, the metrics and the completions. They must be equal for a disturbed
    run and an undisturbed run.
    """
    names = ("adapter/adapter_model.safetensors", "metrics.jsonl", "completions.jsonl")
    return {n: hashlib.sha256((run_dir / n).read_bytes()).hexdigest() for n in names}


def read_rows(run_dir: Path, name: str = "metrics.jsonl") -> list[dict]:
    path = run_dir / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def fork_run(run_file: Path, out: Path, *overrides: str, before=None, evaluate=False) -> int:
    """Start the run in a forked process, which inherits all imports; return its pid."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setpgid(0, 0)
        sink = os.open(os.devnull if out is None else out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        if before is not None:
            before()
        code = _run(run_file, overrides, evaluate)
    finally:
        os._exit(code)


def fork_command(*words: object, stdout: int, stderr: int, before=None) -> int:
    """Start the command ``toolkit`` in a forked process, which inherits all imports; return its
    pid. The parent process closes ``stdout`` and ``stderr``.
    """
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        for handle in {stdout, stderr}:
            os.close(handle)
        return pid
    code = 70
    try:
        os.setpgid(0, 0)
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        os.closerange(3, 64)
        os.environ.update(command_environment())
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = _command([str(word) for word in words], before)
    finally:
        os._exit(code)


def _command(words: list[str], before) -> int:
    import torch

    from toolkit.cli.train import main

    torch.set_num_threads(1)
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, closefd=False)  # noqa: SIM115 - the streams of the process stay open
        for number, mode in ((0, "r"), (1, "w"), (2, "w"))
    )
    sys.argv = ["toolkit", *words]
    if before is not None:
        before()
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def _run(run_file: Path, overrides: tuple[str, ...], evaluate: bool) -> int:
    import warnings

    import torch

    from toolkit.base.errors import ToolkitError
    from toolkit.config import load_run
    from toolkit.train.run import run
    from toolkit.train.run_context import Options

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    stream = open(1, "w", closefd=False, buffering=1)  # noqa: SIM115 - stdout stays open
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        config = load_run(str(run_file), list(overrides), world_size=ranks)
        run(config, Options(out=stream, evaluate=evaluate))
    except ToolkitError as error:
        stream.write(f"error: {error}\n")
        return error.exit_code
    except SystemExit as end:  # another rank reports the error
        return int(end.code or 0)
    except KeyboardInterrupt:
        return 130
    return 0


def wait_for_exit(pid: int, timeout: float = 240) -> int:
    """The exit code of a forked run; -N if signal N ended it."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"the run did not end in {timeout} s")


def wait_for(condition, timeout: float = 120) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "the condition was not met in time"
        time.sleep(0.01)


def raw_rows(run_dir: Path) -> list[str]:
    """The lines of metrics.jsonl; an empty list while the file does not exist."""
    path = run_dir / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


class Command:
    """``toolkit train`` in a forked process with pipes for stdout and stderr."""

    def __init__(self, *words, before=None):
        self.out, out = os.pipe()
        self.err, err = os.pipe()
        for handle in (self.out, self.err):
            os.set_inheritable(handle, False)
        self.pid = fork_command("train", *words, stdout=out, stderr=err, before=before)
        self.returncode = None

    def send_signal(self, number):
        os.kill(self.pid, number)

    def poll(self):
        if self.returncode is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if found else None
        return self.returncode

    def communicate(self, timeout):
        """Wait for the end of the process; return (None, its stderr)."""
        wait_for(lambda: self.poll() is not None, timeout)
        with open(self.err) as file:
            said = file.read()
        if self.out is not None:
            os.close(self.out)
        return None, said


@pytest.fixture(scope="module", autouse=True)
def default_hang_up_handler():
    """Processes that the tests start have the default action for SIGHUP, even if pytest runs under
    nohup. The fixture is autouse: a module uses it by importing it.
    """
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)
