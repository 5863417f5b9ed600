"""The settings that every arm of the benchmark gets, and the result that each arm returns."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

ARMS = ("ours", "trl", "unsloth")

WORKLOADS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "even": {},
        "uneven": {"completion_tokens": 2048, "mean_tokens": 500, "max_seq_length": 2176},
        "long-prompt": {"prompt_tokens": 1024, "max_seq_length": 1344},
        "long-context": {
            "prompts": 1,
            "prompt_tokens": 16384,
            "completion_tokens": 2048,
            "max_seq_length": 18496,
            "r": 32,
            "load_in_4bit": True,
            "per_device_batch": 1,
            "gpu_memory_utilization": 0.45,
        },
    }
)
"""The values of each named workload, which replace the defaults of ``Settings``."""
TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of one benchmark. Lengths are in tokens, batch sizes in completions.

    If ``mean_tokens`` is set, the lengths of completions have a geometric distribution with this
    mean, and ``completion_tokens`` is their maximum. Otherwise, all completions have the length
    ``completion_tokens``.

    An optimizer step has the same number of completions in every arm (every compared program), so
    the work is the same. The ``ours_`` fields are for the toolkit's arm only: its micro-batch
    (``ours_batch``), the maximum number of tokens of a forward pass (``ours_tokens``), gradient
    checkpointing (``ours_checkpointing``), whether the KV cache is freed during training
    (``ours_sleep``), and other options of its engine by name (``ours_engine``). If one of these
    fields is None, ``bench_plan.choose_settings`` chooses its value. If ``ours_batch`` is set, it
    also limits the rows of a forward pass. ``ours_cards`` is the number of cards over which the
    toolkit's arm splits the model, with one process per card.
    """

    model: str
    steps: int = 6
    prompts: int = 8
    num_generations: int = 8
    prompt_tokens: int = 64
    completion_tokens: int = 256
    mean_tokens: int | None = None
    r: int = 64
    per_device_batch: int = 16
    gradient_checkpointing: bool = True
    ours_batch: int | None = None
    ours_tokens: int | None = None
    ours_checkpointing: bool | None = None
    ours_sleep: bool | None = None
    ours_engine: dict[str, Any] | None = None
    ours_cards: int = 1
    gpu_memory_utilization: float = 0.3
    max_seq_length: int = 1024
    load_in_4bit: bool = False
    profile: bool = False
    learning_rate: float = 1e-5
    seed: int = 1

    @property
    def sequences(self) -> int:
        """The number of completions in one optimizer step."""
        return self.prompts * self.num_generations

    @property
    def sequence_tokens(self) -> int:
        """The number of tokens of the longest sequence (prompt and completion)."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def mean_completion_tokens(self) -> float:
        """The mean length of a completion, in tokens."""
        if self.mean_tokens is None:
            return float(self.completion_tokens)
        unfinished_share = (1 - 1 / self.mean_tokens) ** self.completion_tokens
        return self.mean_tokens * (1 - unfinished_share)

    @property
    def decode_steps(self) -> float:
        """The expected number of decode steps in an optimizer step. This is the number of tokens of
        the step's longest completion.
        """
        if self.mean_tokens is None:
            return float(self.completion_tokens)
        return min(float(self.completion_tokens), self.mean_tokens * math.log(self.sequences))

    @property
    def plan_text(self) -> str:
        """The values of the ``ours_`` fields as a text for the user."""
        batch = self.ours_batch or self.per_device_batch
        checkpointing = "checkpointing" if self.ours_checkpointing else "no checkpointing"
        sleep = "KV cache freed while training" if self.ours_sleep else "KV cache kept"
        size = f"micro-batch {batch} x {self.sequences // batch}"
        if self.ours_tokens is not None:
            size = f"passes of at most {self.ours_tokens:,} tokens"
        share = (self.ours_engine or {}).get("gpu_memory_utilization")
        memory = f", gpu_memory_utilization {share:g}" if share is not None else ""
        cards = f", the model over {self.ours_cards} cards" if self.ours_cards > 1 else ""
        return f"{size}, {checkpointing}, {sleep}{memory}{cards}"

    @property
    def accumulation(self) -> int:
        """The number of micro-batches in one optimizer step of TRL's arm and Unsloth's arm."""
        return self.sequences // self.per_device_batch

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read settings that :meth:`write` wrote."""
        return cls(**json.loads(path.read_text()))

    def write(self, path: Path) -> None:
        """Write the settings as JSON for the process of an arm."""
        path.write_text(json.dumps(asdict(self)))


@dataclass(slots=True)
class Result:
    """The measurements of one arm, in seconds, bytes and nats. A measurement that the arm does not
    have is None or an empty list. The trained policy is copied to the engine several times, and
    ``publish_s`` has the seconds that each time took.
    """

    arm: str
    versions: dict[str, str] = field(default_factory=dict)
    load_s: float | None = None
    step_s: list[float] = field(default_factory=list)
    rollout_s: list[float] = field(default_factory=list)
    publish_s: list[float] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    padded_tokens: list[int] = field(default_factory=list)
    completion_tokens: list[int] = field(default_factory=list)
    peak_torch_bytes: int | None = None
    peak_device_bytes: int | None = None
    logp_gap_mean: float | None = None
    logp_gap_max: float | None = None
    base_changed: int | None = None
    base_total: int | None = None
    not_run: str | None = None
    profile: dict[str, Any] | None = None
    """Phases of the start, a decode step and a training step (``bench --profile``)."""

    @property
    def first_step_s(self) -> float | None:
        """Seconds of the first step. It includes compilation, graph capture and cold caches."""
        return self.step_s[0] if self.step_s else None

    @property
    def median_step_s(self) -> float | None:
        """Median seconds of the steps after the first."""
        return upper_median(self.step_s[1:])

    @property
    def median_rollout_s(self) -> float | None:
        """Median seconds of the rollouts after the first."""
        return upper_median(self.rollout_s[1:])

    @property
    def median_training_s(self) -> float | None:
        """Median seconds of the training part of a step, over the steps after the first. This part
        contains the rewards, the training passes and the optimizer. It does not contain the rollout
        and the copy of the policy to the engine.
        """
        step_parts = zip(self.step_s, self.rollout_s, self.publish_s, strict=False)
        return upper_median([step - rollout - publish for step, rollout, publish in step_parts][1:])

    @property
    def rollout_tokens_s(self) -> float | None:
        """Completion tokens per second of rollout, over the steps after the first."""
        return _rate(self.completion_tokens[1:], self.rollout_s[1:])

    @property
    def train_tokens_s(self) -> float | None:
        """Completion tokens per second of training, over the steps after the first. The time of
        training is the time of the step, minus the time of the rollout, minus the time of the copy
        of the policy to the engine.
        """
        step_parts = zip(self.step_s, self.rollout_s, self.publish_s, strict=False)
        training_s = [step - rollout - publish for step, rollout, publish in step_parts]
        return _rate(self.completion_tokens[1:], training_s[1:])

    @property
    def padding_share(self) -> float | None:
        """The share of padding tokens in a batch that is padded to its longest sequence. A padded
        pass computes these tokens, although nothing uses the results.
        """
        if not sum(self.padded_tokens):
            return None
        return 1 - (sum(self.prompt_tokens) + sum(self.completion_tokens)) / sum(self.padded_tokens)

    @classmethod
    def read(cls, path: Path) -> Result:
        """Read a result that :meth:`write` wrote. The derived values are computed again."""
        field_names = {field.name for field in fields(cls)}
        stored = json.loads(path.read_text())
        return cls(**{name: value for name, value in stored.items() if name in field_names})

    def write(self, path: Path) -> None:
        """Write the result atomically, because the arm may be stopped at any time."""
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps(self.to_json()))
        temporary.replace(path)

    def to_json(self) -> dict[str, Any]:
        """Return all values, including the derived ones."""
        derived = (
            "first_step_s",
            "median_step_s",
            "median_rollout_s",
            "median_training_s",
            "rollout_tokens_s",
            "train_tokens_s",
            "padding_share",
        )
        return asdict(self) | {name: getattr(self, name) for name in derived}


def _rate(tokens: list[int], seconds: list[float]) -> float | None:
    return sum(tokens) / sum(seconds) if tokens and sum(seconds) > 0 else None


def upper_median(values: list[float]) -> float | None:
    """Return the median of ``values``. If the number of values is even, this is the larger one of
    the two values in the middle. Return None if there are no values.
    """
    return sorted(values)[len(values) // 2] if values else None
