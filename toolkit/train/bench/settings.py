"""What every arm of the benchmark is given, and what it hands back."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

ARMS = ("ours", "trl", "unsloth")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One workload. Lengths are in tokens, batches in completions.

    The ``ours_`` fields are the micro-batch, checkpointing and KV sleep of our arm; None is for
    ``plan.fill``. The optimizer step sees the same completions, so the work is the same.
    """

    model: str
    steps: int = 6
    prompts: int = 8
    num_generations: int = 8
    prompt_tokens: int = 64
    completion_tokens: int = 256
    r: int = 64
    per_device_batch: int = 16
    gradient_checkpointing: bool = True
    ours_batch: int | None = None
    ours_checkpointing: bool | None = None
    ours_sleep: bool | None = None
    gpu_memory_utilization: float = 0.3
    max_seq_length: int = 1024
    load_in_4bit: bool = False
    learning_rate: float = 1e-5
    seed: int = 1

    @property
    def sequences(self) -> int:
        """Completions in one optimizer step."""
        return self.prompts * self.num_generations

    @property
    def ours_plan(self) -> str:
        """The ``ours_`` fields in words."""
        batch = self.ours_batch or self.per_device_batch
        checkpointing = "checkpointing" if self.ours_checkpointing else "no checkpointing"
        sleep = "KV cache asleep while training" if self.ours_sleep else "KV cache awake"
        return f"micro-batch {batch} x {self.sequences // batch}, {checkpointing}, {sleep}"

    @property
    def accumulation(self) -> int:
        """Micro-batches in one optimizer step, for the peers."""
        return self.sequences // self.per_device_batch

    @classmethod
    def read(cls, path: Path) -> Settings:
        """Settings as :meth:`write` left them."""
        return cls(**json.loads(path.read_text()))

    def write(self, path: Path) -> None:
        """Settings as JSON, for the process of an arm."""
        path.write_text(json.dumps(asdict(self)))


@dataclass(slots=True)
class Result:
    """What one arm measured. Seconds, bytes, nats; None where the arm has no such figure."""

    arm: str
    versions: dict[str, str] = field(default_factory=dict)
    load_s: float | None = None
    step_s: list[float] = field(default_factory=list)
    rollout_s: list[float] = field(default_factory=list)
    publish_s: list[float] = field(default_factory=list)
    completion_tokens: list[int] = field(default_factory=list)
    peak_torch_bytes: int | None = None
    peak_device_bytes: int | None = None
    logp_gap_mean: float | None = None
    logp_gap_max: float | None = None
    base_changed: int | None = None
    base_total: int | None = None
    not_run: str | None = None

    @property
    def first_step_s(self) -> float | None:
        """The first step: compilation, graph capture and cold caches show here."""
        return self.step_s[0] if self.step_s else None

    @property
    def median_step_s(self) -> float | None:
        """Median of the steps after the first."""
        rest = sorted(self.step_s[1:])
        return rest[len(rest) // 2] if rest else None

    @property
    def rollout_tokens_s(self) -> float | None:
        """Completion tokens a second of rollout, over the steps after the first."""
        return _rate(self.completion_tokens[1:], self.rollout_s[1:])

    @property
    def train_tokens_s(self) -> float | None:
        """Completion tokens a second of everything but rollout and publish, likewise."""
        spent = zip(self.step_s, self.rollout_s, self.publish_s, strict=False)
        rest = [step - rollout - publish for step, rollout, publish in spent]
        return _rate(self.completion_tokens[1:], rest[1:])

    @classmethod
    def read(cls, path: Path) -> Result:
        """A result as :meth:`write` left it; the derived figures are derived again."""
        known = {field.name for field in fields(cls)}
        stored = json.loads(path.read_text())
        return cls(**{name: value for name, value in stored.items() if name in known})

    def write(self, path: Path) -> None:
        """Whole or not at all: the arm may be stopped at any time."""
        beside = path.with_suffix(".part")
        beside.write_text(json.dumps(self.to_json()))
        beside.replace(path)

    def to_json(self) -> dict[str, Any]:
        """Everything, the derived figures included."""
        derived = ("first_step_s", "median_step_s", "rollout_tokens_s", "train_tokens_s")
        return asdict(self) | {name: getattr(self, name) for name in derived}


def _rate(tokens: list[int], seconds: list[float]) -> float | None:
    return sum(tokens) / sum(seconds) if tokens and sum(seconds) > 0 else None
