"""`envcheck check --set`: the pre-flight judges the run as its command line changes it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ENVCHECK = Path(sys.executable).with_name("envcheck")
RUN_FILE = """\
model: {model_name: model}
dataset: {path: train.jsonl, prompt: question}
reward: {functions: [{name: exact_match}]}
runtime: {engine: transformers, output_dir: run}
"""


def check(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "run.yaml").write_text(RUN_FILE)
    command = [str(ENVCHECK), "check", "--only", "host.writable", *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=60)


@pytest.mark.parametrize(
    ("place", "code"), [("elsewhere", 0), ("/proc/self/nowhere", 1)], ids=["good", "bad"]
)
def test_another_output_folder_is_judged(tmp_path: Path, place: str, code: int) -> None:
    result = check(tmp_path, "--config", "run.yaml", "--set", f"runtime.output_dir={place}")
    assert result.returncode == code, result.stdout + result.stderr
    assert ("/proc/self/nowhere" in result.stdout) is (code == 1)


def test_a_change_of_no_run_file_is_a_usage_error(tmp_path: Path) -> None:
    result = check(tmp_path, "--set", "lora.r=8")
    assert result.returncode == 2
    assert "--config RUN.yaml" in result.stderr


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("runtime.engine=vllm", "LOAD025"),  # heads of 16 values, on a CPU
        ("model.load_in_8bit=true", "LOAD002"),
        ("model.attn_implementation=flash_attention_2", "LOAD023"),
        ("model.load_in_fp8=true", "LOAD020"),
    ],
)
def test_a_run_that_cannot_be_here_is_not_ready(tmp_path: Path, override: str, rule: str) -> None:
    (tmp_path / "model").mkdir()
    shape = '"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2'
    (tmp_path / "model" / "config.json").write_text(f'{{"model_type": "llama", {shape}}}')
    (tmp_path / "train.jsonl").write_text(8 * '{"question": "1+1?"}\n')
    result = check(tmp_path, "--config", "run.yaml", "--set", override)
    assert result.returncode == 1, result.stdout + result.stderr
    assert rule in result.stderr
    assert "Ready." not in result.stdout
