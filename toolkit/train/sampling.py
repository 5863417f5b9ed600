"""Where completions come from: the engine on the model, or TRL's own Hugging Face generation, each
seeded by the step.

TRL draws from the process's global generator, so a completion would hang on whatever ran before.
Here the seed of every call is a hash of (run seed, micro-step, number of the call within it, rank):
a resumed run draws what the undisturbed run drew.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import contextmanager, nullcontext
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from toolkit.base.errors import UnsupportedError
from toolkit.engine.rollout import Sampling, derive_seed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toolkit.engine.base import RolloutEngine
    from toolkit.engine.rollout import Rollout

EVAL_CALLS = 1 << 20
"""Calls in evaluation count from here, so that they never draw what training draws at the same
micro-step.
"""
RANK_CALLS = 1 << 24


class Timers:
    """Seconds spent, by phase name, since the last ``take``."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the time that the block takes towards ``phase``."""
        begin = perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] += perf_counter() - begin

    def take(self) -> dict[str, float]:
        """What has been counted, and begin again."""
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds


def find_engine(model: Any) -> RolloutEngine | None:
    """The engine that ``FastLanguageModel`` put on the model, through PEFT's and other wrappers."""
    for _ in range(4):
        engine = getattr(model, "toolkit_engine", None)
        if engine is not None:
            return engine  # type: ignore[no-any-return]  # an attribute of a module has no type
        inner = getattr(model, "base_model", None) or getattr(model, "model", None)
        if inner is None or inner is model:
            return None
        model = inner
    return None


def call_seed(trainer: Any) -> int:
    """The seed of the next rollout call of ``trainer``; two calls never share one.

    It needs nothing of our trainer's ``__init__``: TRL's tests build trainers with
    ``object.__new__``.
    """
    state = getattr(trainer, "state", None)
    model = getattr(trainer, "model", None)
    mode = "train" if getattr(model, "training", True) else "eval"
    micro_step = getattr(trainer, "_step", 0)
    key = (mode, micro_step, getattr(state, "global_step", 0))
    last_key, calls = getattr(trainer, "_rollout_calls", (None, 0))
    calls = calls + 1 if key == last_key else 0
    trainer._rollout_calls = (key, calls)
    rank = getattr(getattr(trainer, "accelerator", None), "process_index", 0)
    offset = (EVAL_CALLS if mode == "eval" else 0) + RANK_CALLS * rank
    seed = getattr(getattr(trainer, "args", None), "seed", 0)
    return derive_seed(seed, micro_step, calls + offset)


@contextmanager
def seeded(seed: int, device: torch.device | None) -> Iterator[None]:
    """Inside, torch's generators start from ``seed``; outside, they are as if nothing had been
    drawn.
    """
    devices = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed % 2**63)
        yield


class EngineGeneration:
    """What TRL 1.16 calls ``vllm_generation``: ``sync_weights()`` and ``generate(...)``, here on an
    engine in this process.

    The engine already holds the base weights, so syncing publishes the adapter and nothing else.
    """

    def __init__(self, trainer: Any, engine: RolloutEngine) -> None:
        self.trainer, self.engine = trainer, engine

    def sync_weights(self) -> None:
        """Make the adapter under training what the engine samples from."""
        with self.trainer.timers("publish_s"):
            self.engine.publish(self.trainer.accelerator.unwrap_model(self.trainer.model))

    def generate(
        self,
        prompts: list[list[int]],
        images: list[Any] | None,
        num_generations: int,
        profiler: Any = None,
    ) -> tuple[Any, Any, Any, Any]:
        """One completion for each row of ``prompts`` (token ids; equal neighbours are one prompt's
        generations).

        Returns ``(prompt_ids, completion_ids, logprobs, logprob_token_ids)`` in TRL's layout, a row
        a prompt row.

        Raises:
            UnsupportedError: images.
        """
        if images is not None and any(images):
            raise UnsupportedError(
                "the engine samples text only", where="dataset", fix="leave images out"
            )
        seed = call_seed(self.trainer)
        count = group_size(prompts, num_generations)
        with profiler or nullcontext():
            rollout: Rollout = self.engine.generate(
                prompts[::count], self.sampling(count), seed=seed
            )
        # Where the run was sized for it, the KV cache's memory is now the trainer's.
        self.engine.sleep()
        return rollout.as_tuple()

    def sampling(self, n: int) -> Sampling:
        """The trainer's sampling options, as they are now."""
        trainer = self.trainer
        return Sampling(
            n=n,
            max_tokens=trainer.max_completion_length,
            temperature=trainer.temperature,
            top_p=trainer.top_p,
            top_k=trainer.top_k,
            min_p=trainer.min_p,
            repetition_penalty=trainer.repetition_penalty,
            structured_outputs_regex=trainer.args.vllm_structured_outputs_regex,
            logprobs=0,
            extra=dict(trainer.args.generation_kwargs or {}),
        )


def group_size(prompts: list[list[int]], num_generations: int) -> int:
    """How many equal neighbours make a group, the same everywhere: ``num_generations``, or 1 where
    groups are cut or mixed.

    A group that is one request computes its prompt once. A rank may hold half a group, and a tool
    turn makes neighbours differ.
    """
    if num_generations < 2 or len(prompts) % num_generations:
        return 1
    for start in range(0, len(prompts), num_generations):
        group = prompts[start : start + num_generations]
        if any(ids != group[0] for ids in group[1:]):
            return 1
    return num_generations
