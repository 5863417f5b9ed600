"""Stopping, saving and going on: the half of the trainer that makes a run survive.

What is stored lies in ``resume``; these are the seams of transformers 5.17 that call it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer

from toolkit.train import faults, resume
from toolkit.train.checkpoint import choose, list_steps, rotate

if TYPE_CHECKING:
    from collections.abc import Mapping

    from toolkit.train.metrics import Journal
    from toolkit.train.signals import StopSignals


class Resumable(Trainer):  # type: ignore[misc]  # transformers ships no usable types
    """A Trainer that stores its whole state; ``journal`` and ``signals`` are the run's."""

    journal: Journal | None = None
    signals: StopSignals | None = None
    fingerprint: Mapping[str, Any] = {}
    keep_last: int | None = None
    keep_best: int = 0
    pending_evaluation: bool = False
    stopping: bool = False
    snapshot: resume.Snapshot | None = None
    _saved_step: int = -1
    _epochs_done: int = 0

    def _any_rank(self, flag: int) -> int:
        """The largest flag of all ranks."""
        if self.accelerator.num_processes == 1:
            return flag
        mine = torch.tensor([int(flag)], device=self.accelerator.device)
        return int(self.accelerator.gather(mine).max())

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """TRL's; ``resume_from_checkpoint=True`` takes the latest checkpoint that is sound."""
        run_dir = Path(self.args.output_dir)
        if resume_from_checkpoint is True and self._stores_adapter() and list_steps(run_dir):
            folder, passed = choose(run_dir, "must")
            for line in passed:
                faults.logger.warning("passed over a torn checkpoint: %s", line)
            resume_from_checkpoint = str(folder)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        signal = 0 if self.signals is None else self._any_rank(self.signals.number)
        if self.signals is not None and signal:
            self.signals.agree(signal)
            self.stopping = True
            self.control.should_save = self.control.should_training_stop = True
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.signals is not None:
            self.snapshot = resume.take(self)
            self.signals.unshield()

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        if self.signals is None:
            return super()._evaluate(*args, **kwargs)
        # Evaluation can be cut: what follows the step is saved with the evaluation still to do.
        self.snapshot = resume.take(self, pending_evaluation=True)
        self.signals.unshield()
        metrics = super()._evaluate(*args, **kwargs)
        self.signals.shield()
        self.pending_evaluation = False
        return metrics

    def _stores_adapter(self) -> bool:
        """True where a checkpoint is ours; full fine-tuning, DeepSpeed and FSDP keep HF's."""
        adapted = hasattr(self.accelerator.unwrap_model(self.model), "peft_config")
        return adapted and not self._sharded()

    def _sharded(self) -> bool:
        """True where no process holds the whole model."""
        return bool(self.is_deepspeed_enabled or self.is_fsdp_enabled)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if not self._stores_adapter():
            super()._save_checkpoint(model, trial)
        elif self._saved_step != self.state.global_step:
            self.save_snapshot(resume.take(self))

    def save_snapshot(self, snapshot: resume.Snapshot) -> None:
        """Write the checkpoint of a snapshot and remove those that need not be kept; every rank
        calls it.
        """
        run_dir = Path(self.args.output_dir)
        resume.save(self, snapshot, run_dir)
        self._saved_step = snapshot.hf_state.global_step
        if self.accelerator.is_main_process:
            keep_last = self.args.save_total_limit if self.keep_last is None else self.keep_last
            rotate(run_dir, resume.best_steps(run_dir, self.keep_best), keep_last=keep_last or 0)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        if not resume.is_ours(folder):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        resume.check(self, folder)
        resume.load_policy(self, folder)
        self._epochs_done = resume.epochs_done(folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not resume.is_ours(Path(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            resume.load_progress(self, Path(checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Called once, after the first batch has been fetched: a pending evaluation runs here."""
        if checkpoint is None or not resume.is_ours(Path(checkpoint)):
            super()._load_rng_state(checkpoint)
            return
        resume.load_generators(self, Path(checkpoint))
        if self.pending_evaluation:
            self._determine_best_metric(self._evaluate(None, None), None)

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        """TRL's, its generator brought to the resumed epoch (it draws one order an epoch)."""
        sampler = super()._get_train_sampler(dataset)
        for _ in range(self._epochs_done if self.shuffle_dataset else 0):
            torch.randperm(sampler.num_samples, generator=sampler.generator)
        return sampler
