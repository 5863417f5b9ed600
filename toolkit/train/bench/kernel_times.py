"""Measure how long each kind of kernel runs, and how long the host works, in a decode step and a
training step.

The measurements are made with torch.profiler. On the CPU, torch's operations are measured instead
of kernels. The time of an operation does not include the operations that it calls.

The time in which no kernel runs counts as host time: the GPU waits for Python, the scheduler or the
launch of a kernel. The profiler itself slows the host down.
"""

from __future__ import annotations

import re
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from toolkit.engine.rollout_request import Sampling

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from toolkit.train.bench.arm_settings import Settings

KINDS = (
    ("LoRA", r"lora_(shrink|expand)|sgmv|bgmv"),
    ("dequantization", r"dequant|kgemm_4bit|gemm_4bit|quantize_blockwise"),
    ("attention", r"flash|fmha|attention|paged|varlen|reshape_and_cache"),
    (
        "matrix products",
        r"gemm|gemv|cutlass|cublas|nvjet|xmma|splitk|\bmm\b|addmm|bmm|matmul",
    ),
    ("optimizer", r"adam|multi_tensor|foreach|lerp"),
    ("norms and rotary", r"norm|rotary|rope"),
    ("logits and sampling", r"softmax|log_softmax|logsumexp|gumbel|sample|topk|top_k|argmax|sort"),
    ("copies and fills", r"memcpy|memset|copy|fill|zero_|\bcat\b|catarray|gather|index|scatter"),
    ("communication", r"nccl|allreduce|all_reduce"),
    ("elementwise", r"elementwise|vectorized|silu|act_and_mul|reduce|add|mul|where|unary|binary"),
)
OTHER_KIND = "other"
DECODE_STEPS = 32
TOP_KERNELS = 12


@dataclass(slots=True)
class KernelTimes:
    """The time of each kind of kernel, summed over ``steps`` steps. ``kinds`` has [seconds, calls]
    for each kind of kernel. ``top`` has (name, seconds, calls) for the kernels that take longest.
    """

    steps: int
    wall_s: float
    kinds: dict[str, list[float]] = field(default_factory=dict)
    top: list[tuple[str, float, int]] = field(default_factory=list)

    @property
    def busy_s(self) -> float:
        """The seconds in which kernels run (on the CPU: torch's operations)."""
        return sum(seconds for seconds, _ in self.kinds.values())

    @property
    def host_s(self) -> float:
        """The seconds of wall-clock time in which no kernel runs."""
        return max(0.0, self.wall_s - self.busy_s)

    def subtract(self, other: KernelTimes, steps: int) -> KernelTimes:
        """Subtract the times and calls of ``other`` from those of this account, and return the
        result as an account of ``steps`` steps. A negative difference becomes 0.
        """
        difference = KernelTimes(steps, max(self.wall_s - other.wall_s, 0.0), top=self.top)
        for kind, (seconds, calls) in self.kinds.items():
            other_kind = other.kinds.get(kind, [0.0, 0])
            difference.kinds[kind] = [
                max(seconds - other_kind[0], 0.0),
                max(calls - other_kind[1], 0),
            ]
        return difference

    def to_json(self) -> dict[str, Any]:
        """Return the seconds and calls of each kind of kernel, per step."""
        return {
            "steps": self.steps,
            "wall_s": self.wall_s / self.steps,
            "busy_s": self.busy_s / self.steps,
            "host_s": self.host_s / self.steps,
            "kinds": {
                kind: {"s": seconds / self.steps, "calls": calls / self.steps}
                for kind, (seconds, calls) in sorted(
                    self.kinds.items(), key=lambda item: -item[1][0]
                )
            },
            "top": [
                {"name": name, "s": seconds / self.steps, "calls": calls / self.steps}
                for name, seconds, calls in self.top
            ],
        }


def kind_of(name: str) -> str:
    """Return the kind of a kernel or operation, from its name."""
    lower_name = name.lower()
    return next((kind for kind, pattern in KINDS if re.search(pattern, lower_name)), OTHER_KIND)


class KernelRecorder:
    """Profiles a block of code with torch.profiler, and returns the time of each kind of kernel."""

    def __init__(self) -> None:
        self.cuda = torch.cuda.is_available()
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.cuda else [])]
        self._profiler = profile(activities=kinds, acc_events=True)
        self._start_s = 0.0
        self.wall_s = 0.0

    def start(self) -> None:
        """Start the profiler."""
        self._profiler.start()
        self._start_s = self._now()

    def stop(self) -> None:
        """Stop the profiler."""
        self.wall_s = self._now() - self._start_s
        self._profiler.stop()

    def kernel_times(self, steps: int) -> KernelTimes:
        """Return the time of each kind of kernel in the profiled block, which has
        ``steps`` steps.
        """
        sums: dict[str, list[float]] = {}
        for event in self._profiler.key_averages():
            on_device = event.device_type.name != "CPU"
            if on_device != self.cuda:
                continue
            micros = event.self_device_time_total if self.cuda else event.self_cpu_time_total
            total = sums.setdefault(event.key, [0.0, 0])
            total[0] += micros / 1e6
            total[1] += event.count
        times = KernelTimes(steps, self.wall_s)
        for name, (seconds, calls) in sums.items():
            kind = times.kinds.setdefault(kind_of(name), [0.0, 0])
            kind[0] += seconds
            kind[1] += calls
        ranked = sorted(sums.items(), key=lambda item: -item[1][0])[:TOP_KERNELS]
        times.top = [(name, seconds, int(calls)) for name, (seconds, calls) in ranked]
        return times

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


@contextmanager
def record_kernels() -> Iterator[KernelRecorder]:
    """A context manager that profiles the block and yields its ``KernelRecorder``."""
    recorder = KernelRecorder()
    recorder.start()
    try:
        yield recorder
    finally:
        recorder.stop()


def decode_kernel_times(
    engine: Any, prompts: Sequence[Sequence[int]], generations: int
) -> KernelTimes:
    """Return the time of each kind of kernel in ``DECODE_STEPS`` decode steps of ``engine``, with
    ``generations`` sequences per prompt.

    Two rollouts are profiled: one of a single token per sequence, and one that is ``DECODE_STEPS``
    tokens longer. The result is the difference of their times.
    """

    def run(tokens: int) -> KernelRecorder:
        no_early_end = {"ignore_eos": True}
        sampling = Sampling(n=generations, max_tokens=tokens, extra=no_early_end)
        engine.generate(prompts, sampling, seed=1)
        with record_kernels() as recorder:
            engine.generate(prompts, sampling, seed=1)
        return recorder

    short, long = run(1), run(1 + DECODE_STEPS)
    return long.kernel_times(DECODE_STEPS).subtract(short.kernel_times(1), DECODE_STEPS)


class TrainingProfile(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Profiles the last optimizer step without its rollout. The profile begins at the end of the
    rollout.
    """

    def __init__(self, settings: Settings) -> None:
        self.last = settings.steps - 1
        self.step = 0
        self.recorder: KernelRecorder | None = None

    def start_in_last_step(self) -> None:
        """Called at the end of a rollout. Starts the profiler if the step is the last one."""
        if self.step == self.last and self.recorder is None:
            self.recorder = KernelRecorder()
            self.recorder.start()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Called at the end of every optimizer step. The last of these calls stops the profiler."""
        if self.recorder is not None and self.step == self.last:
            self.recorder.stop()
        self.step += 1


def kernel_table(name: str, times: dict[str, Any]) -> list[list[str]]:
    """Return the account as rows of text. Each row has a kind of kernel, its milliseconds per step,
    its calls per step, and its share of the wall-clock time.
    """
    wall = times["wall_s"] or 1.0
    rows = [[name, f"{1e3 * wall:.2f} ms", "", ""]]
    for kind, total in times["kinds"].items():
        share = f"{total['s'] / wall:.0%}"
        rows.append([f"  {kind}", f"{1e3 * total['s']:.2f} ms", f"{total['calls']:.0f}", share])
    host = times["host_s"]
    rows.append(["  host, no kernel running", f"{1e3 * host:.2f} ms", "", f"{host / wall:.0%}"])
    return rows
