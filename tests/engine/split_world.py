"""Runs of ``toolkit train`` in processes that share a model: a small world of words, and what is
read of a run.
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


def make(folder: Path, family: str = "llama", *, steps: int = 4, delay: float = 0.0) -> Path:
    """Write model, data, reward and run file; returns the run file."""
    folder.mkdir(parents=True, exist_ok=True)
    engine_checkpoints.make(folder / "model", family)
    rows = [{"question": f"t{5 + n} t{40 + 3 * n} t{90 + n} t7", "answer": "t4"} for n in range(24)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "my_rewards.py").write_text(REWARDS.format(delay=delay))
    run_file = folder / "run.yaml"
    run_file.write_text(RUN_FILE.format(steps=steps))
    return run_file


def start(run_file: Path, run_dir: Path, size: int, *sets: str) -> subprocess.Popen[str]:
    """``toolkit train`` in ``size`` processes of this node."""
    words = [sys.executable, "-m", "toolkit", "train", str(run_file), "--no-evaluate"]
    words += ["--output-dir", str(run_dir)]
    for one in sets:
        words += ["--set", one]
    if size > 1:
        words += ["--nproc-per-node", str(size)]
    return subprocess.Popen(
        words,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CI": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def train(run_file: Path, run_dir: Path, size: int, *sets: str) -> str:
    """The same to its end; what it said."""
    process = start(run_file, run_dir, size, *sets)
    told, _ = process.communicate(timeout=900)
    assert process.returncode == 0, told
    return told


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def completions(run_dir: Path) -> list[tuple[Any, ...]]:
    """What was drawn."""
    lines = (run_dir / "completions.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [(row["step"], row["prompt"], row["completion"]) for row in found]


def distance(one: Path, other: Path) -> float:
    """The largest difference of two adapters, in an element."""
    mine, theirs = (load_file(d / "adapter/adapter_model.safetensors") for d in (one, other))
    assert {n: t.shape for n, t in mine.items()} == {n: t.shape for n, t in theirs.items()}
    return max((mine[name] - theirs[name]).abs().max().item() for name in mine)


def digests(run_dir: Path) -> dict[str, str]:
    """What must be equal between two runs of one run file."""
    names = ("adapter/adapter_model.safetensors", "metrics.jsonl", "completions.jsonl")
    return {n: hashlib.sha256((run_dir / n).read_bytes()).hexdigest() for n in names}
