"""Compare ``envcheck validate`` with check-jsonschema on the same files and the same schema.

python tests/bench/bench_validate.py [--files 2000] [--repeat 5]

The results are ratios of times from one run. The path of check-jsonschema is CHECK_JSONSCHEMA, or
it is next to this Python, or on PATH. The two commands alternate, so that other load of the machine
affects both. check-jsonschema checks only the structure of a file; envcheck also runs every rule.
The exit code is 1 if a ratio or the memory of envcheck is above its bound.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
ONE_FILE, MANY_FILES, MEMORY_MB = 1.0, 0.6, 200.0

RUN = """\
# A run file of forty lines.
model:
  model_name: Qwen/Qwen3-0.6B
  max_seq_length: 1024
  load_in_4bit: false
  fast_inference: true
  max_lora_rank: auto
  gpu_memory_utilization: auto
lora:
  r: 64
  lora_alpha: 64
  target_modules: [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]
  lora_dropout: 0.0
  bias: none
  use_gradient_checkpointing: auto
  random_state: {number}
dataset:
  path: openai/gsm8k
  name: main
  split: train
  prompt: question
  answer: answer
reward:
  functions:
    - name: numeric_match
      weight: 1.0
grpo:
  learning_rate: 5.0e-6
  per_device_train_batch_size: 1
  gradient_accumulation_steps: 8
  num_generations: 8
  max_prompt_length: 256
  max_completion_length: 200
  max_steps: 250
  save_steps: 250
  temperature: 1.0
  loss_type: dapo
runtime:
  engine: auto
  output_dir: runs/{number}
  resume: auto
"""


def run_timed(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak megabytes of a command that must succeed."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    assert process.stderr is not None
    error = process.stderr.read().decode()
    process.stderr.close()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command[:4])} ... failed: {error}")
    return seconds, usage.ru_maxrss / 1024


def find_check_jsonschema() -> str:
    """The path of check-jsonschema."""
    sibling = Path(sys.executable).with_name("check-jsonschema")
    command = os.environ.get("CHECK_JSONSCHEMA") or (
        str(sibling) if sibling.exists() else shutil.which("check-jsonschema")
    )
    if not command:
        raise SystemExit("check-jsonschema is not installed: pip install check-jsonschema==0.39.0")
    return command


def measure(folder: Path, files: int, repeat: int) -> dict[str, float]:
    """The median times of both commands, on one file and on many, and their ratios."""
    ours = [str(Path(sys.executable).with_name("envcheck")), "validate"]
    peer = [find_check_jsonschema(), "--schemafile", str(ROOT / "schemas" / "run.schema.json")]
    names = []
    for number in range(files):
        path = folder / f"run-{number:05d}.yaml"
        path.write_text(RUN.format(number=number), encoding="utf-8")
        names.append(str(path))
    result: dict[str, float] = {}
    for label, chosen, times in (
        ("one", names[:1], repeat),
        ("half", names[: files // 2], max(1, repeat // 3)),
        ("many", names, max(1, repeat // 3)),
    ):
        seconds: dict[str, list[float]] = {"ours": [], "peer": []}
        peak = 0.0
        for _ in range(times):
            for program, command in (("ours", ours), ("peer", peer)):
                if label == "half" and program == "peer":
                    continue
                run_seconds, memory = run_timed([*command, *chosen])
                seconds[program].append(run_seconds)
                peak = max(peak, memory) if program == "ours" else peak
        result[f"{label}_ours_s"] = statistics.median(seconds["ours"])
        result[f"{label}_memory_mb"] = peak
        if seconds["peer"]:
            result[f"{label}_peer_s"] = statistics.median(seconds["peer"])
            result[f"{label}_ratio"] = result[f"{label}_ours_s"] / result[f"{label}_peer_s"]
    result["linear"] = result["many_ours_s"] / (2 * result["half_ours_s"])
    return result


def main() -> int:
    """Measure, print the figures, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    limit = 4096
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    )
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), arguments.files, arguments.repeat)
    if arguments.json:
        print(json.dumps(figures, indent=2))
    else:
        for label, count in (("one", 1), ("many", arguments.files)):
            print(
                f"{count:5d} files: envcheck {figures[f'{label}_ours_s']:.3f} s, check-jsonschema "
                f"{figures[f'{label}_peer_s']:.3f} s, ratio {figures[f'{label}_ratio']:.2f}, "
                f"peak {figures[f'{label}_memory_mb']:.0f} MB"
            )
        print(f"twice the files take {2 * figures['linear']:.2f} times the time")
    within_bounds = (
        figures["one_ratio"] <= ONE_FILE
        and figures["many_ratio"] <= MANY_FILES
        and figures["many_memory_mb"] <= MEMORY_MB
    )
    return 0 if within_bounds else 1


if __name__ == "__main__":
    raise SystemExit(main())
