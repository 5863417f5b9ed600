"""A function that runs ``envcheck`` in a new process, and a valid run file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FIXTURES = Path(__file__).parents[1] / "fixtures"
ENVCHECK = Path(sys.executable).with_name("envcheck")
PARTS = FIXTURES / "parts"
VALID_RUN_FILE = f"""\
model: {{model_name: {PARTS}/model, max_seq_length: 1024}}
dataset: {{path: {PARTS}/train.jsonl, prompt: question, answer: answer}}
reward: {{functions: [{{name: exact_match}}]}}
"""


def envcheck(*arguments: object, stdin: str | bytes = "", cwd: Path | None = None,
             env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Run the installed command in a new process."""
    data = stdin.encode() if isinstance(stdin, str) else stdin
    result = subprocess.run(
        [ENVCHECK, *map(str, arguments)],
        input=data,
        capture_output=True,
        check=False,
        cwd=cwd,
        timeout=60,
        env={**os.environ, "HF_HOME": "/nonexistent", **(env or {})},
    )
    assert b"Traceback" not in result.stderr + result.stdout
    return subprocess.CompletedProcess(
        result.args, result.returncode, result.stdout.decode(), result.stderr.decode()
    )
