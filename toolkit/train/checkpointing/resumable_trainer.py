"""The part of the trainer that stops, saves and resumes a run.

It overrides the methods of transformers 5.17 that save and load checkpoints. ``trainer_state``
defines what a checkpoint contains.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import Trainer

from toolkit.engine.mesh import current_mesh
from toolkit.train.checkpointing import rollback, trainer_state
from toolkit.train.checkpointing.branch import Branch, resume_point, rotate_checkpoints
from toolkit.train.checkpointing.checkpoint import list_steps
from toolkit.train.process_control import is_first_rank
from toolkit.train.step import step_errors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

    from toolkit.train.checkpointing.run_dir_watch import RunDirWatch
    from toolkit.train.checkpointing.stop_signals import StopSignals
    from toolkit.train.report.metrics_log import Journal


RUN_DIR_LOST = 1 << 10
"""A flag that ranks exchange in place of a signal number. It means that the run folder was moved,
removed or replaced.
"""


class ResumableTrainer(Trainer):  # type: ignore[misc]  # transformers ships no usable types
    """A Trainer that saves and restores its whole state.

    A run of ``toolkit train`` sets ``journal``, ``run_dir_watch`` and ``signals``. In a script they
    are None.
    """

    run_dir_watch: RunDirWatch | None = None
    journal: Journal | None = None
    signals: StopSignals | None = None
    fingerprint: Mapping[str, Any] = {}
    keep_last: int | None = None
    keep_best: int = 0
    pending_evaluation: bool = False
    is_stopping: bool = False
    is_run_dir_lost: bool = False
    resumed_from: Path | None = None
    _branch: Branch | None = None
    _moved_run_dir: Path | None = None
    snapshot: trainer_state.TrainerSnapshot | None = None
    _saved_step: int = -1
    _epochs_done: int = 0

    def _max_over_ranks(self, flag: int) -> int:
        """Return the largest value that ``flag`` has on any rank. Every rank must call this."""
        if (mesh := current_mesh()) is not None:
            return mesh.max_over_run(flag, self.accelerator.device)
        if self.accelerator.num_processes == 1:
            return flag
        local = torch.tensor([int(flag)], device=self.accelerator.device)
        return int(self.accelerator.gather(local).max())

    @property
    def branch(self) -> Branch:
        """The branch to which new checkpoints belong."""
        if self._branch is None:
            self._branch = Branch()
        return self._branch

    @branch.setter
    def branch(self, branch: Branch) -> None:
        self._branch = branch

    @property
    def run_dir(self) -> Path:
        """The path of the run folder, also after it was moved."""
        return self._moved_run_dir or Path(self.args.output_dir)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train as in TRL. Only ``resume_from_checkpoint=True`` differs: it selects the latest
        valid checkpoint.
        """
        run_dir = Path(self.args.output_dir)
        if resume_from_checkpoint is True and self._uses_toolkit_format() and list_steps(run_dir):
            folder, skipped = resume_point(run_dir, "must")
            for line in skipped:
                step_errors.logger.warning("skipped %s", line)
            resume_from_checkpoint = str(folder)
        if self.signals is None and self._uses_toolkit_format():
            self._begin_branch(run_dir, resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _begin_branch(self, run_dir: Path, resume_from: Any) -> None:
        """Choose the branch (a sequence of steps) to which new checkpoints belong. Only the trainer
        of a user's script calls this method, because ``toolkit train`` chooses the branch itself.
        """
        source = Path(resume_from) if isinstance(resume_from, (str, Path)) else None
        if source is not None and not trainer_state.is_toolkit_checkpoint(source):
            source = None
        elif source is not None:
            trainer_state.check_checkpoint(self, source)  # before files are moved
        if is_first_rank() and run_dir.is_dir():
            start = rollback.begin_branch(run_dir, source, with_logs=False)
            for line in start.notes:
                step_errors.logger.warning("%s", line)
            self.branch = start.branch
        self.accelerator.wait_for_everyone()

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        flag = 0 if self.signals is None else self._max_over_ranks(self._stop_flag())
        if self.signals is not None and flag:
            self._stop_training(flag)
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.signals is not None:
            self.snapshot = trainer_state.take_snapshot(self)
            is_only_process = self.accelerator.num_processes == 1 and current_mesh() is None
            if (
                is_only_process
                and self.signals.signal_number
                and self._saved_step == self.state.global_step
            ):
                # If a signal came while the checkpoint was written, stop at once.
                self.is_stopping = self.control.should_training_stop = True
                self.signals.begin_shutdown()
            self.signals.unshield()

    def _stop_flag(self) -> int:
        """Return the reason to stop the run, as a number: ``RUN_DIR_LOST`` if the run folder is no
        longer in its place, else the number of the received signal. 0 means that the run continues.
        """
        assert self.signals is not None
        return (
            RUN_DIR_LOST
            if self.run_dir_watch is not None and not self.run_dir_watch.is_unchanged()
            else self.signals.signal_number
        )

    def _stop_training(self, flag: int) -> None:
        """Save and stop training. Every rank calls this with the same ``flag``."""
        assert self.signals is not None
        if flag == RUN_DIR_LOST:
            self.is_run_dir_lost = True
            self._find_moved_run_dir()
        else:
            self.signals.record_agreed_signal(flag)
            self.is_stopping = True
        self.signals.begin_shutdown()
        self.control.should_save = not self.is_run_dir_lost or self._moved_run_dir is not None
        self.control.should_training_stop = True

    def _find_moved_run_dir(self) -> None:
        """On the first rank, find the path to which the run folder was moved. Send this path to all
        ranks, which then use it.
        """
        paths = [None if self.run_dir_watch is None else self.run_dir_watch.current_path()]
        if (shared := current_mesh()) is not None:
            paths = [shared.broadcast_over_run(paths[0])]
        elif self.accelerator.num_processes > 1:
            broadcast_object_list(paths)
        self._moved_run_dir = paths[0]

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        if self.signals is None:
            return super()._evaluate(*args, **kwargs)
        # An evaluation may be interrupted. Then the state after the step is saved, and the resumed
        # run repeats the evaluation.
        self.snapshot = trainer_state.take_snapshot(self, pending_evaluation=True)
        self.signals.unshield()
        metrics = super()._evaluate(*args, **kwargs)
        self.signals.shield()
        self.pending_evaluation = False
        return metrics

    def _uses_toolkit_format(self) -> bool:
        """True if checkpoints have the toolkit's format. With full fine-tuning, DeepSpeed or FSDP,
        they have the format of transformers.
        """
        has_adapter = hasattr(self.accelerator.unwrap_model(self.model), "peft_config")
        return has_adapter and not self._sharded()

    def is_world_process_zero(self) -> bool:
        """Whether this process logs and saves. If processes share a model, only their first one
        does.
        """
        shared = current_mesh()
        return bool(super().is_world_process_zero() and (shared is None or shared.is_first))

    def _sharded(self) -> bool:
        """True if no process has the whole model (DeepSpeed or FSDP)."""
        return bool(self.is_deepspeed_enabled or self.is_fsdp_enabled)

    def save_last_snapshot(self) -> None:
        """Save a checkpoint of the state before the interrupted step. Call this method only in a
        run with one process.
        """
        if self.run_dir_watch is not None and not self.run_dir_watch.is_unchanged():
            self.is_run_dir_lost = True
            self._find_moved_run_dir()
        if self.snapshot is None or (self.is_run_dir_lost and self._moved_run_dir is None):
            return
        if self.snapshot.hf_state.global_step > 0:
            self.save_snapshot(self.snapshot)

    def _save_checkpoint(self, model: PreTrainedModel, trial: Any) -> None:
        if not self._uses_toolkit_format():
            super()._save_checkpoint(model, trial)
        else:
            self.save_snapshot(trainer_state.take_snapshot(self))

    def save_snapshot(self, snapshot: trainer_state.TrainerSnapshot) -> None:
        """Write the checkpoint of ``snapshot``, unless this checkpoint exists. Then remove old
        checkpoints (``_remove_old_checkpoints``). Every rank must call this.
        """
        step = snapshot.hf_state.global_step
        if self._saved_step == step:
            return
        trainer_state.save(self, snapshot, self.run_dir)
        self._saved_step = step
        if is_first_rank():
            self._remove_old_checkpoints(self.run_dir, step)
        self.accelerator.wait_for_everyone()

    def _remove_old_checkpoints(self, run_dir: Path, written_step: int) -> None:
        """Remove old checkpoints, as the limits of the user say. Three checkpoints are always kept:
        the checkpoint of the step ``written_step``, the checkpoint from which the run resumed, and
        the checkpoint at which its branch begins.
        """
        keep_last = self.args.save_total_limit if self.keep_last is None else self.keep_last
        kept_steps = {
            written_step,
            self.branch.start_step,
            *trainer_state.best_steps(run_dir, self.keep_best, self.branch),
        }
        if self.resumed_from is not None:
            kept_steps.add(
                trainer_state.step_of(self.resumed_from) if self.resumed_from.is_dir() else None
            )
        if self.args.load_best_model_at_end:
            kept_steps.add(self.state.best_global_step)
        steps = [step for step in kept_steps if step is not None]
        rotate_checkpoints(run_dir, steps, keep_last=keep_last or 0, branch=self.branch)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """Do the same as transformers, but do not remove checkpoints in the toolkit's format. Only
        ``_remove_old_checkpoints`` removes them. With save_total_limit 1, transformers would remove
        all checkpoints except the best one.
        """
        limit = self.args.save_total_limit
        if self._uses_toolkit_format():
            self.args.save_total_limit = None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: PreTrainedModel | None = None
    ) -> None:
        folder = Path(resume_from_checkpoint)
        if not trainer_state.is_toolkit_checkpoint(folder):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        trainer_state.check_checkpoint(self, folder)
        trainer_state.load_adapter(self, folder)
        self._epochs_done = trainer_state.epochs_done(folder)
        self.resumed_from = folder
        if folder.resolve().parent == Path(self.args.output_dir).resolve():
            self._saved_step = trainer_state.step_of(folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not trainer_state.is_toolkit_checkpoint(Path(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            trainer_state.load_progress(self, Path(checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore the random generators, then run a pending evaluation. transformers calls this
        once, after the first batch has been fetched.
        """
        if checkpoint is None or not trainer_state.is_toolkit_checkpoint(Path(checkpoint)):
            super()._load_rng_state(checkpoint)
            return
        trainer_state.load_generators(self, Path(checkpoint))
        if self.pending_evaluation:
            self._determine_best_metric(self._evaluate(None, None), None)

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        """Return TRL's sampler. For each epoch, its random generator draws a new order of the rows.
        When a run resumes, the generator is advanced by the epochs that are already done.
        """
        sampler = super()._get_train_sampler(dataset)
        for _ in range(self._epochs_done if self.shuffle_dataset else 0):
            torch.randperm(sampler.num_samples, generator=sampler.generator)
        return sampler
