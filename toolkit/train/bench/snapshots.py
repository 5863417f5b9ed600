"""Save the adapters of a run while it trains, in one layout for every arm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from transformers import TrainerCallback

from toolkit.train.bench.learn_settings import LearnResult, LearnSettings, Point
from toolkit.train.bench.probes import synchronized_time

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch


class Snapshots(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Saves the adapter before the first step, then every ``settings.every`` steps, and after the
    last step. For each saved adapter, a ``Point`` is added to the result. The seconds of the point
    are the total time of the optimizer steps until then.
    """

    def __init__(
        self,
        result: LearnResult,
        settings: LearnSettings,
        save: Callable[[int], str],
        write: Callable[[], None],
    ) -> None:
        self.result, self.every, self.last_step = result, settings.every, settings.steps
        self.save, self.write = save, write
        self.train_s, self.step_start_s = 0.0, 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Save the adapter before the first step, and start the clock."""
        self._save_point(0)
        self.step_start_s = synchronized_time()

    def on_step_end(self, _args: Any, state: Any, _control: Any, **kwargs: Any) -> None:
        """Stop the clock after an optimizer step, save the adapter if this step is a multiple of
        ``every`` or the last one, and restart the clock.
        """
        now = synchronized_time()
        self.train_s += now - self.step_start_s
        step = int(state.global_step)
        if step % self.every == 0 or step == self.last_step:
            self._save_point(step)
        self.step_start_s = synchronized_time()

    def on_log(self, *args: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Record the mean reward of the step. Keep the largest differences so far between the
        log-probabilities of engine and trainer.
        """
        logs = logs or {}
        if "reward" in logs:
            self.result.rewards.append(float(logs["reward"]))
        for field, names in (
            ("logp_gap_mean", ("sampling/logp_gap_mean", "sampling/sampling_logp_difference/mean")),
            ("logp_gap_max", ("sampling/logp_gap_max", "sampling/sampling_logp_difference/max")),
        ):
            values = [float(logs[name]) for name in names if name in logs]
            if values:
                setattr(self.result, field, max(getattr(self.result, field) or 0.0, values[0]))

    def _save_point(self, step: int) -> None:
        self.result.points.append(Point(step, self.train_s, self.save(step)))
        self.write()


def adapter_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the adapter's parameters by name. The names do not have the parts that PEFT and
    torch.compile add.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            short_name = name.replace("base_model.model.", "").replace("_orig_mod.", "")
            tensors[short_name.replace(".default", "")] = parameter
    return tensors


def save_adapter(model: torch.nn.Module, folder: Path, step: int) -> str:
    """Write the adapter in float32. Return the file's path, relative to the folder of results."""
    path = folder / f"step-{step:05d}.safetensors"
    tensors = adapter_tensors(model)
    save_file({k: v.detach().float().cpu().contiguous() for k, v in tensors.items()}, path)
    return f"{folder.name}/{path.name}"


def generation_library(trainer: Any) -> str:
    """Return the name of the library that samples the completions of ``trainer``."""
    return "vLLM" if getattr(trainer, "use_vllm", False) else "transformers"
