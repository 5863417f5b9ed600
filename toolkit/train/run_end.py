"""Check that a run trained all its steps, and build the errors for a run that ended early."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.base.errors import ConfigError, DefectError, StoppedError
from toolkit.train.checkpointing import branch

if TYPE_CHECKING:
    from toolkit.config.run_config import RunConfig
    from toolkit.train.checkpointing.run_dir_watch import RunDirWatch
    from toolkit.train.process_control import Peers
    from toolkit.train.trainer import GRPOTrainer


def refuse_unfinished(trainer: GRPOTrainer, total: int) -> None:
    """Raise an error if training ended before the step ``total`` without a known reason.

    Raises:
        DefectError: training ended early for an unknown reason.
    """
    step = int(trainer.state.global_step)
    if step >= total or trainer.is_stopping or trainer.is_run_dir_lost:
        return
    raise DefectError(
        f"training ended at step {step} of {total} for an unknown reason",
        where=str(trainer.run_dir),
        fix="run the same command again to resume from the last checkpoint. If training ends at "
        f"step {step} again, report a defect",
    )


def refuse_lost_run_dir(
    trainer: GRPOTrainer, run_dir_watch: RunDirWatch | None, peers: Peers | None
) -> None:
    """Raise an error if the run folder is no longer at its path. Files that are written after this
    would be lost, or would be written to another folder.

    Raises:
        ConfigError: the run folder was removed, moved or replaced. Every rank raises the same
            error.
    """
    if not trainer.is_run_dir_lost:
        if run_dir_watch is not None and not run_dir_watch.is_in_place():
            raise run_dir_watch.change_error()
        return
    error = None if run_dir_watch is None else run_dir_watch.change_error()
    if peers is not None:  # every rank raises the error, and one of them reports it
        message_parts = None if error is None else [error.message, error.where, error.fix]
        message, where, fix = peers.exchange("lost", message_parts)[0]
        error = ConfigError(message, where=where, fix=fix)
    assert error is not None
    raise error


def stopped_error(config: RunConfig, signal_name: str, *, begun: bool) -> StoppedError:
    """Return the error for a run that the signal ``signal_name`` stopped. ``begun`` is False if the
    signal arrived before the log files of the run were opened.
    """
    run_dir, resume = Path(config.runtime.output_dir), config.runtime.resume
    names_checkpoint = resume not in ("auto", "must", "never")
    fix = "run the same command again: it resumes from the last checkpoint"
    if names_checkpoint and not begun:
        progress = f"no step was completed since {resume}"
    else:
        steps = branch.valid_steps(run_dir)
        progress = f"checkpoint-{steps[0]} was saved" if steps else "no step was completed yet"
        if steps and (names_checkpoint or resume == "never"):
            fix = (
                f"run the command again with --resume auto: it resumes from checkpoint-{steps[0]}, "
                f"not from {resume}"
            )
    return StoppedError(f"stopped by {signal_name}; {progress}", where=str(run_dir), fix=fix)


def total_steps(trainer: GRPOTrainer) -> int:
    """Return the number of optimizer steps of the whole run, counted as in transformers 5.17. If
    too few micro-batches for a step remain at the end of an epoch, they also count as one step.
    """
    if trainer.args.max_steps > 0:
        return int(trainer.args.max_steps)
    micro_batches = len(trainer.get_train_dataloader())
    steps_per_epoch = max(1, math.ceil(micro_batches / trainer.args.gradient_accumulation_steps))
    steps: int = math.ceil(steps_per_epoch * trainer.args.num_train_epochs)
    return steps
