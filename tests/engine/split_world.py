"""Helpers that run ``toolkit train`` in processes that share a model: write the files of a small
run, start it, and read its results.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import engine_checkpoints
from safetensors.torch import load_file

if TYPE_CHECKING:
    from pathlib import Path

RUN_FILE = """\
model: {{model_name: model, max_seq_length: 32, dtype: float32, max_lora_rank: 8,
  kv_cache_bytes: 33554432}}
lora: {{r: 4, lora_alpha: 8, random_state: 5}}
dataset: {{path: train.jsonl, prompt: question, answer: answer}}
reward: {{functions: [{{name: "my_rewards:even"}}]}}
grpo:
  max_steps: {steps}
  per_device_train_batch_size: 8
  num_generations: 4
  max_prompt_length: 12
  max_completion_length: 8
  learning_rate: 0.001
  max_grad_norm: 0.05
  save_steps: 2
  seed: 3
runtime: {{engine: vllm, output_dir: run, allow_code: [my_rewards]}}
"""
REWARDS = """\
import time

def even(completions, **_):
    time.sleep({delay})
    words = [text.split() for text in completions]
    return [sum(int(w[1:]) % 2 == 0 for w in found) / max(1, len(found)) for found in words]
"""


def make_run_files(
    folder: Path, family: str = "llama", *, steps: int = 4, delay: float = 0.0
) -> Path:
    """Write model, dataset, reward and run file; return the path of the run file."""
    folder.mkdir(parents=True, exist_ok=True)
    engine_checkpoints.make_checkpoint(folder / "model", family)
    rows = [{"question": f"t{5 + n} t{40 + 3 * n} t{90 + n} t7", "answer": "t4"} for n in range(24)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "my_rewards.py").write_text(REWARDS.format(delay=delay))
    run_file = folder / "run.yaml"
    run_file.write_text(RUN_FILE.format(steps=steps))
    return run_file


def start_training(
    run_file: Path, run_dir: Path, size: int, *overrides: str
) -> subprocess.Popen[str]:
    """Start ``toolkit train`` in ``size`` processes of this node."""
    command = [sys.executable, "-m", "toolkit", "train", str(run_file), "--no-evaluate"]
    command += ["--output-dir", str(run_dir)]
    for override in overrides:
        command += ["--set", override]
    if size > 1:
        command += ["--nproc-per-node", str(size)]
    return subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CI": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def run_training(run_file: Path, run_dir: Path, size: int, *overrides: str) -> str:
    """Run ``toolkit train`` to its end, check that its exit code is 0, and return its output."""
    process = start_training(run_file, run_dir, size, *overrides)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    return output


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; none if the file does not exist yet."""
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def read_completions(run_dir: Path) -> list[tuple[Any, ...]]:
    """(step, prompt, completion) of each row of completions.jsonl."""
    lines = (run_dir / "completions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [(row["step"], row["prompt"], row["completion"]) for row in rows]


def largest_adapter_difference(first_run: Path, second_run: Path) -> float:
    """The largest difference between two elements of the adapters of two runs."""
    first_tensors, second_tensors = (
        load_file(d / "adapter/adapter_model.safetensors") for d in (first_run, second_run)
    )
    assert {n: t.shape for n, t in first_tensors.items()} == {
        n: t.shape for n, t in second_tensors.items()
    }
    return max(
        (first_tensors[name] - second_tensors[name]).abs().max().item() for name in first_tensors
    )


def output_digests(run_dir: Path) -> dict[str, str]:
    """Digests of the files that must be equal between two runs of one run file."""
    names = ("adapter/adapter_model.safetensors", "metrics.jsonl", "completions.jsonl")
    return {n: hashlib.sha256((run_dir / n).read_bytes()).hexdigest() for n in names}
