"""500 steps of ``toolkit train`` leak no memory, file descriptors, threads or Python objects.

The test samples /proc about ten times per second. A sample is the sum, over the command and its
child processes, of the resident memory (VmRSS), the open file descriptors and the threads. A sample
belongs to the last step in timings.jsonl at that moment. The test compares resident memory, because
a cluster kills a job for its resident memory. So memory that the allocator keeps after it was freed
counts as used. The run saves checkpoints, evaluates and writes completions.

The samples of the first ``WARM_UP`` steps do not count, because these steps fill caches (allocator
arenas, kernels chosen on first use, vLLM's block pool). The highest later sample must be at most
2 % above the median of the ``REFERENCE`` steps that follow the warm-up. For this small model, 2 %
are 14 MiB, or 36 KiB per step. A list that keeps the rollouts of each step could be smaller. So the
reward, which runs in the training process, also counts the objects that the garbage collector
tracks, in two steps that are far apart.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import train_world as world

STEPS, WARM_UP, REFERENCE = 500, 100, 50
TOLERANCE = 0.02
EARLY, LATE = 210, 460
OBJECTS_PER_STEP = 3.0
"""sympy's bounded cache of torch's shapes adds one object per step. The metrics of a step are more
than thirty objects, so a leak of them exceeds the limit.
"""

COUNTS = f"""
import gc
from pathlib import Path

import torch

told = Path(__file__).with_name("objects.txt")

def ones(completions, trainer_state, **_):
    if trainer_state.global_step in ({EARLY}, {LATE}):
        gc.collect()
        found = gc.get_objects()
        tensors = sum(type(one) is torch.Tensor for one in found)
        with told.open("a") as file:
            file.write(f"{{trainer_state.global_step}} {{len(found)}} {{tensors}}\\n")
    return [c.count("1") / max(1, len(c)) for c in completions]
"""


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement of the command and its child processes."""

    step: int
    resident_bytes: int
    descriptors: int
    threads: int


def process_tree(pid: int) -> list[int]:
    """``pid`` and the ids of its running descendants."""
    pids = [pid]
    for parent in pids:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{parent}/task").iterdir():
                pids += map(int, (task / "children").read_text().split())
    return pids


def take_sample(pid: int, run_dir: Path) -> Sample | None:
    """One sample; None before the first step, or if a process ends during the measurement."""
    try:
        step = (run_dir / "timings.jsonl").read_bytes().count(b"\n")
        resident = descriptors = threads = 0
        for one in process_tree(pid):
            lines = Path(f"/proc/{one}/status").read_text().splitlines()
            status = dict(line.split(":", 1) for line in lines)
            resident += int(status["VmRSS"].split()[0]) * 1024
            threads += int(status["Threads"])
            descriptors += len(list(Path(f"/proc/{one}/fd").iterdir()))
    except (OSError, KeyError):
        return None
    return Sample(step, resident, descriptors, threads) if step else None


def sample_run(run_file: Path) -> list[Sample]:
    """Run the command to its end and return the samples of its steps."""
    out = run_file.parent / "out.txt"
    with out.open("w") as sink:
        process = subprocess.Popen(
            [world.BIN / "toolkit", "train", str(run_file)],
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=world.command_environment(),
        )
    samples = []
    while process.poll() is None:
        sample = take_sample(process.pid, run_file.parent / "run")
        if sample is not None and sample.step < STEPS:  # after the last step, the report is written
            samples.append(sample)
        time.sleep(0.1)
    assert process.returncode == 0, out.read_text()
    return samples


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["transformers", pytest.param("vllm", marks=pytest.mark.engine)])
def test_500_steps_leak_no_memory_files_or_processes(tmp_path, engine):
    if engine == "vllm":
        pytest.importorskip("vllm")
    run_file = world.make_run_files(tmp_path, engine=engine, steps=STEPS)
    often = "save_steps: 25\n  eval_strategy: steps\n  eval_steps: 50"
    text = run_file.read_text().replace("save_steps: 2", often)
    # The reward counts objects, so it must run in the training process. test_rewards_worker.py
    # tests the reward worker.
    run_file.write_text(text.replace("reward: {", "reward: {isolate: false, "))
    (tmp_path / "my_rewards.py").write_text(COUNTS)
    samples = sample_run(run_file)
    assert len(world.read_rows(tmp_path / "run", "timings.jsonl")) == STEPS
    counted = [sample for sample in samples if sample.step > WARM_UP]
    reference = [sample for sample in counted if sample.step <= WARM_UP + REFERENCE]
    assert len({sample.step for sample in counted}) > STEPS // 10, "too few steps were sampled"

    memory = statistics.median(sample.resident_bytes for sample in reference)
    highest = max(sample.resident_bytes for sample in counted)
    (_, before, tensors_before), (_, after, tensors_after) = [
        tuple(map(int, line.split()))
        for line in (tmp_path / "objects.txt").read_text().splitlines()
    ]
    print(
        f"{engine}: {len(counted)} samples; {memory / 2**20:.1f} MiB, highest"
        f" {highest / 2**20:.1f} ({highest / memory - 1:+.2%}); {after - before:+} objects,"
        f" {tensors_after - tensors_before:+} tensors in {LATE - EARLY} steps"
    )
    assert highest <= memory * (1 + TOLERANCE)
    assert after - before <= OBJECTS_PER_STEP * (LATE - EARLY)
    assert tensors_after <= tensors_before
    for what in ("descriptors", "threads"):
        first = max(getattr(sample, what) for sample in reference)
        # A checkpoint that is being written has open files. They do not change the median.
        last = statistics.median(getattr(sample, what) for sample in counted[-len(counted) // 4 :])
        assert last <= first, what
