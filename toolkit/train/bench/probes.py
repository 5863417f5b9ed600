"""Measure the trainer of an arm through public hooks, without changing the trainer."""

from __future__ import annotations

import hashlib
import threading
import time
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

if TYPE_CHECKING:
    from collections.abc import Callable

    from toolkit.train.bench.arm_settings import Result


def synchronized_time() -> float:
    """Wait until the device has finished all queued work, and return the time in seconds."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class StepClock(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Appends the seconds of every optimizer step to ``result.step_s``, and then calls ``save``."""

    def __init__(self, result: Result, save: Callable[[], None]) -> None:
        self.result, self.save, self.last = result, save, 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock of the first step."""
        self.last = synchronized_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Record the seconds of the optimizer step, call ``save``, and restart the clock."""
        now = synchronized_time()
        self.result.step_s.append(now - self.last)
        self.save()
        self.last = synchronized_time()

    def on_log(self, *args: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Record the differences between the log-probabilities of engine and trainer, if the arm
        logs them.
        """
        for result_field, names in (
            ("logp_gap_mean", ("sampling/logp_gap_mean", "sampling/sampling_logp_difference/mean")),
            ("logp_gap_max", ("sampling/logp_gap_max", "sampling/sampling_logp_difference/max")),
        ):
            for name in names:
                if logs and name in logs:
                    setattr(self.result, result_field, float(logs[name]))
                    break


class TimedGeneration:
    """A wrapper of TRL's generation object that passes every call on. It measures the time of the
    rollout, and the time in which the policy is copied to the engine.
    """

    def __init__(self, inner: Any, result: Result) -> None:
        self.inner, self.result = inner, result
        self.on_rollout_end: Callable[[], None] = lambda: None

    def sync_weights(self) -> Any:
        """Call ``sync_weights`` of the wrapped object, which copies the policy to the engine.
        Measure the time of the call.
        """
        start = synchronized_time()
        result = self.inner.sync_weights()
        self.result.publish_s.append(synchronized_time() - start)
        return result

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Draw one batch of completions with the wrapped object, and measure the time."""
        start = synchronized_time()
        result = self.inner.generate(*args, **kwargs)
        self.result.rollout_s.append(synchronized_time() - start)
        prompts, completions = ([len(ids) for ids in token_lists] for token_lists in result[:2])
        self.result.completion_tokens.append(sum(completions))
        if len(prompts) == len(completions):
            self.result.prompt_tokens.append(sum(prompts))
            widest = max(prompts, default=0) + max(completions, default=0)
            self.result.padded_tokens.append(widest * len(completions))
        self.on_rollout_end()
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def base_digests(model: torch.nn.Module) -> dict[str, str]:
    """Return a digest of every parameter of the base model (every parameter that does not belong to
    an adapter). The keys are the names of the parameters, without the prefixes that PEFT adds.
    """
    digests = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            continue
        base_name = name.replace("base_model.model.", "").replace(".base_layer", "")
        raw = parameter.detach().contiguous().view(torch.uint8).flatten()
        digests[base_name] = _digest(raw)
    return digests


def _digest(raw: torch.Tensor) -> str:
    """Return a digest of the bytes ``raw``. On the CPU it is their SHA-256. On a GPU it consists of
    two sums, because copying a model to the host for SHA-256 would take longer than a step.

    The second sum is weighted by position, so that it also detects swapped bytes.
    """
    if raw.device.type == "cpu":
        return hashlib.sha256(raw.numpy().tobytes()).hexdigest()
    total, weighted = 0, 0
    for chunk in torch.split(raw, 2**26):
        values = chunk.to(torch.int64)
        weights = torch.arange(1, len(values) + 1, device=values.device) % 65521
        total += int(values.sum())
        weighted += int((values * weights).sum())
    return f"{total}-{weighted}"


class MemoryWatch:
    """A context manager that measures the peak memory of the device during the block.
    ``peak_torch_bytes`` of the result is torch's peak. ``peak_device_bytes`` is the largest value
    that the driver reports (every 20 ms).

    If the engine frees the memory of its KV cache during training, torch still counts this memory
    as used. So only the driver's peak is the memory that a run needs. On a CPU, both values stay
    None.
    """

    def __init__(self, result: Result) -> None:
        self.result = result
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self._thread.start()

    def __exit__(self, *_: object) -> None:
        if torch.cuda.is_available():
            self._done.set()
            self._thread.join()
            self.result.peak_torch_bytes = torch.cuda.max_memory_allocated()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            free, total = torch.cuda.mem_get_info()
            self.result.peak_device_bytes = max(self.result.peak_device_bytes or 0, total - free)


def compare_bases(before: dict[str, str], after: dict[str, str], result: Result) -> None:
    """Record in ``result`` the number of tensors of the base model, and how many of them the run
    changed.
    """
    shared = before.keys() & after.keys()
    result.base_total = len(shared)
    result.base_changed = sum(before[name] != after[name] for name in shared)
