"""`just bench`: the time and the memory that the light commands and the demo take.

This is a benchmark, not a test: it prints each figure next to its goal, and the exit code is 0 even
if a goal is missed.

Run: python tests/bench/bench_commands.py [--no-demo]
"""

from __future__ import annotations

import os
import re
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

BIN = Path(sys.executable).parent
RUN = """\
model: {{model_name: {model}, max_seq_length: 64}}
dataset: {{path: train.jsonl, prompt: prompt, answer: answer}}
reward: {{functions: [{{name: exact_match}}]}}
grpo: {{max_steps: 1, per_device_train_batch_size: 8, num_generations: 8}}
"""


@dataclass(frozen=True)
class CommandCost:
    seconds: float
    peak_mib: float
    output: str
    code: int


def measure(command: list[str]) -> CommandCost:
    """Wall seconds and peak resident MiB of one command with its children (wait4's rusage)."""
    with tempfile.TemporaryFile() as sink:
        start = time.perf_counter()
        pid = os.posix_spawn(
            command[0],
            command,
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, sink.fileno(), 1),
                (os.POSIX_SPAWN_DUP2, sink.fileno(), 2),
            ],
        )
        _, status, usage = os.wait4(pid, 0)
        seconds = time.perf_counter() - start
        sink.seek(0)
        text = sink.read().decode(errors="replace")
    return CommandCost(seconds, usage.ru_maxrss / 1024, text, os.waitstatus_to_exitcode(status))


def print_row(name: str, measured: str, goal: str, reached: bool) -> None:
    print(f"{name:<34} {measured:>18}   goal {goal:<10} {'ok' if reached else 'MISSED'}")


def measure_light_command(
    name: str, command: list[str], goal_ms: float, goal_mib: float | None
) -> None:
    runs = [measure(command) for _ in range(10)]
    failed = [run for run in runs if run.code not in (0, 1)]
    if failed:
        print(f"{name}: exit {failed[0].code}\n{failed[0].output}")
        return
    median_ms = 1000 * statistics.median(run.seconds for run in runs)
    print_row(name, f"{median_ms:.0f} ms", f"<{goal_ms:.0f} ms", median_ms < goal_ms)
    if goal_mib is not None:
        peak = max(run.peak_mib for run in runs)
        print_row(f"{name}, memory", f"{peak:.0f} MiB", f"<{goal_mib:.0f} MiB", peak < goal_mib)


def measure_demo(folder: Path) -> None:
    run = measure([str(BIN / "toolkit"), "demo", "--out", str(folder / "demo")])
    accuracy = re.search(r"exact match ([\d.]+) -> ([\d.]+) on (\d+)", run.output)
    if run.code or not accuracy:
        print(f"demo: exit {run.code}\n{run.output[-2000:]}")
        return
    before, after = float(accuracy[1]), float(accuracy[2])
    print_row("demo", f"{run.seconds:.0f} s", "<=120 s", run.seconds <= 120)
    print_row("demo, memory", f"{run.peak_mib:.0f} MiB", "<2048 MiB", run.peak_mib < 2048)
    print_row("demo, exact match before", f"{before:.2f}", "<=0.60", before <= 0.6)
    print_row("demo, exact match after", f"{after:.2f}", ">=0.90", after >= 0.9)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        run_file = folder / "run.yaml"
        run_file.write_text(RUN.format(model="Qwen/Qwen2.5-0.5B"))
        (folder / "train.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
        measure_light_command("envcheck --help", [str(BIN / "envcheck"), "--help"], 150, 60)
        measure_light_command(
            "envcheck validate", [str(BIN / "envcheck"), "validate", str(run_file)], 250, None
        )
        measure_light_command("envcheck check", [str(BIN / "envcheck"), "check"], 2000, None)
        if "--no-demo" not in sys.argv:
            measure_demo(folder)


if __name__ == "__main__":
    main()
