"""Save and restore everything that a trainer needs to resume exactly.

The Trainer of transformers stores weights, optimizer and random generators. TRL does not store its
own state (TRL 1.16, transformers 5.17). So the micro-step counter, the buffered rollouts with their
log-probabilities, and the order of later epochs would be lost. This module stores all of this
state, without pickle.
"""

from __future__ import annotations

import copy
import json
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from transformers import TrainerState

from toolkit.base import disk_errors
from toolkit.base.errors import ConfigError, InputError, ToolkitError, first_line
from toolkit.base.files import MAX_DATA_BYTES
from toolkit.base.paths import write_file
from toolkit.base.version import __version__
from toolkit.engine.mesh import current_mesh
from toolkit.policy.adapter_io import read_tensors
from toolkit.train.checkpointing import checkpoint, optimizer_settings
from toolkit.train.checkpointing.branch import TRAINER_STATE_FILE, valid_steps
from toolkit.train.checkpointing.checkpoint import STATE_FILE
from toolkit.train.checkpointing.state_files import (
    Tensors,
    copy_into_parameters,
    flatten,
    gather_trainable,
    generator_states,
    load_optimizer,
    optimizer_state,
    restore_generators,
    trainable_parameters,
    unflatten,
)
from toolkit.train.process_control import is_first_rank

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel

    from toolkit.train.checkpointing.branch import Branch
    from toolkit.train.trainer_seam import TrainerSeam

OPTIMIZER_FILE = "optimizer.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
_MAX_STEPS = 1 << 40
COUNTERS = ("_step", "entropy_coef", "_last_world_entropy", "bad_steps")


@dataclass
class TrainerSnapshot:
    """The state that changes during a step, as it was at the end of the previous step."""

    hf_state: Any
    counters: dict[str, Any]
    rollout_buffer: Any
    generator_states: dict[str, Any]
    generator_tensors: Tensors
    log_positions: dict[str, int] = field(default_factory=dict)
    log_sha256: dict[str, str] = field(default_factory=dict)
    pending_evaluation: bool = False
    curriculum: dict[str, torch.Tensor] | None = None
    """The records of the curriculum, which are equal on all ranks."""


def take_snapshot(trainer: TrainerSeam, *, pending_evaluation: bool = False) -> TrainerSnapshot:
    """Return a snapshot of ``trainer``. Buffered rollouts are not copied, so a snapshot costs
    little time and memory.
    """
    states, tensors = generator_states()
    state = copy.copy(trainer.state)
    state.log_history = list(state.log_history)
    state.total_flos += trainer.current_flos
    generate_every = trainer.args.steps_per_generation * trainer.num_iterations
    # Rollouts that the next step does not read are not stored.
    is_used_up = trainer.micro_steps % generate_every == 0
    return TrainerSnapshot(
        hf_state=state,
        counters={name: getattr(trainer, name) for name in COUNTERS},
        rollout_buffer=None if is_used_up else trainer.rollout_buffer,
        generator_states=states,
        generator_tensors=tensors,
        log_positions=trainer.journal.positions() if trainer.journal is not None else {},
        log_sha256=trainer.journal.digests() if trainer.journal is not None else {},
        pending_evaluation=pending_evaluation,
        curriculum=trainer.prompt_choice.state(),
    )


def save_adapter(model: PreTrainedModel, folder: Path, tensors: Tensors | None = None) -> None:
    """Write the adapter in PEFT's format (adapter_config.json, adapter_model.safetensors). If the
    values of two adapters are equal, their files are equal, byte by byte. If ``model`` has only a
    part of the adapter, ``tensors`` must be the complete adapter.
    """
    adapter = model.active_adapter
    config = model.peft_config[adapter]
    config.save_pretrained(str(folder))
    settings = json.loads((folder / "adapter_config.json").read_text())
    for key, value in settings.items():
        # PEFT writes sets in hash order, which varies.
        settings[key] = (
            sorted(value) if isinstance(value, list) and key != "rank_pattern" else value
        )
    settings["inference_mode"] = True
    write_file(
        folder / "adapter_config.json", json.dumps(settings, indent=2, sort_keys=True) + "\n"
    )
    stored = trainable_parameters(model) if tensors is None else tensors
    stored = {name: p.detach().cpu().contiguous() for name, p in stored.items()}
    save_file(stored, str(folder / ADAPTER_FILE), metadata={"format": "pt"})


def save(trainer: TrainerSeam, snapshot: TrainerSnapshot, run_dir: Path) -> Path | None:
    """Write the checkpoint ``checkpoint-<step>`` from ``snapshot``. Every rank must call this.
    Return the checkpoint's folder on the first rank, None on the others.

    Raises:
        ToolkitError: the disk failed or is full. The message has the size of the checkpoint.
    """
    accelerator = trainer.accelerator
    step = snapshot.hf_state.global_step
    partial = checkpoint.partial_path_of(run_dir, step)
    model, is_first, shared = (
        accelerator.unwrap_model(trainer.model),
        is_first_rank(),
        current_mesh(),
    )
    try:
        # Every process sends its part, and the first process writes the files.
        adapter = gather_trainable(model)
        state = optimizer_state(_unwrapped(trainer.optimizer))
        if is_first:
            if trainer.journal is not None:
                trainer.journal.sync()  # the logs must have every row that the checkpoint records
            checkpoint.begin(run_dir, step)
            save_adapter(model, partial, adapter)
            _save_shared(trainer, snapshot, partial, state)
        accelerator.wait_for_everyone()
        if shared is None or shared.is_first:
            _save_rank(snapshot, partial, accelerator.process_index)
        accelerator.wait_for_everyone()
        folder = checkpoint.commit(partial, step) if is_first else None
    except Exception as error:
        # Before ``disk_errors.to_toolkit_error``, which reports the free space.
        shutil.rmtree(partial, ignore_errors=True)
        user_error = disk_errors.to_toolkit_error(
            error, run_dir, needed=_estimate_bytes(trainer, snapshot)
        )
        if user_error is None or user_error is error:
            raise
        raise user_error from error
    accelerator.wait_for_everyone()
    return folder


def _estimate_bytes(trainer: TrainerSeam, snapshot: TrainerSnapshot) -> int:
    """Return the estimated size of a checkpoint in bytes. It is the total size of the tensors of
    all ranks.
    """
    tensors: Tensors = {}
    flatten(_unwrapped(trainer.optimizer).state_dict(), tensors, "optimizer")
    shared_tensors = [
        *tensors.values(),
        *trainable_parameters(trainer.accelerator.unwrap_model(trainer.model)).values(),
    ]
    rank_tensors: Tensors = dict(snapshot.generator_tensors)
    flatten(snapshot.rollout_buffer, rank_tensors, "buffered")
    flatten(snapshot.curriculum, rank_tensors, "choice")
    processes: int = trainer.accelerator.num_processes
    return sum(t.nbytes for t in shared_tensors) + processes * sum(
        t.nbytes for t in rank_tensors.values()
    )


def _save_shared(
    trainer: TrainerSeam, snapshot: TrainerSnapshot, folder: Path, state: Mapping[str, Any]
) -> None:
    """Write the files that all ranks share. ``state`` is the state of the optimizer."""
    snapshot.hf_state.save_to_json(str(folder / TRAINER_STATE_FILE))
    tensors: Tensors = {}
    optimizer = flatten(state, tensors, "optimizer")
    save_file(tensors, str(folder / OPTIMIZER_FILE))
    scaler = getattr(trainer.accelerator, "scaler", None)
    content = {
        "toolkit": __version__,
        "run": dict(trainer.fingerprint),
        "branch": trainer.branch.to_json(),
        "world_size": trainer.accelerator.num_processes,
        "tensor_parallel_size": 1 if (shared := current_mesh()) is None else shared.size,
        "counters": snapshot.counters,
        "positions": snapshot.log_positions,
        "log_sha256": snapshot.log_sha256,
        "pending_evaluation": snapshot.pending_evaluation,
        "score": latest_reward(snapshot.hf_state),
        "optimizer": optimizer,
        "scheduler": flatten(trainer.lr_scheduler.state_dict(), {}, "scheduler"),
        "scaler": None if scaler is None else flatten(scaler.state_dict(), {}, "scaler"),
    }
    write_file(folder / STATE_FILE, json.dumps(content, indent=1) + "\n")


def _save_rank(snapshot: TrainerSnapshot, folder: Path, rank: int) -> None:
    tensors = dict(snapshot.generator_tensors)
    state = {
        "generators": snapshot.generator_states,
        "buffered": flatten(snapshot.rollout_buffer, tensors, "buffered"),
    }
    if snapshot.curriculum is not None:
        state["choice"] = flatten(snapshot.curriculum, tensors, "choice")
    save_file(tensors, str(folder / f"rank-{rank}.safetensors"))
    write_file(folder / f"rank-{rank}.json", json.dumps(state) + "\n")


def check_checkpoint(trainer: TrainerSeam, folder: Path) -> None:
    """Reject a checkpoint that is damaged, was written by another number of processes, or has an
    unusable state. Nothing is loaded into ``trainer``.

    Raises:
        ConfigError: the checkpoint is damaged, or another number of processes wrote it.
        InputError: another program or release wrote the state.
    """
    if faults := checkpoint.find_faults(folder):
        raise ConfigError(
            f"the checkpoint is damaged: {'; '.join(faults)}",
            where=str(folder),
            fix=(
                "set runtime.resume to an earlier checkpoint, or to auto for the latest valid one"
            ),
        )
    size = 1 if (shared := current_mesh()) is None else shared.size
    checkpoint.check_replica_count(folder, trainer.accelerator.num_processes, size)
    with _state_errors_translated(folder):
        # Check that transformers can read this file as its own state, which it does later.
        TrainerState(**checkpoint.read_json(folder, TRAINER_STATE_FILE))
    step_of(folder)
    epochs_done(folder)


def load_adapter(trainer: TrainerSeam, folder: Path) -> None:
    """Load the adapter of a checkpoint into the model under training, in place."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    copy_into_parameters(
        trainable_parameters(model), _read_tensors(folder / ADAPTER_FILE), str(folder)
    )


def load_progress(trainer: TrainerSeam, folder: Path) -> None:
    """Restore optimizer, scheduler, counters and buffered rollouts from a checkpoint. Raises
    InputError if its state is unusable.
    """
    with _state_errors_translated(folder):
        state = checkpoint.read_json(folder, STATE_FILE)
        tensors = _read_tensors(folder / OPTIMIZER_FILE)
        settings = optimizer_settings.read_settings(trainer)
        load_optimizer(_unwrapped(trainer.optimizer), unflatten(state["optimizer"], tensors))
        trainer.lr_scheduler.load_state_dict(unflatten(state["scheduler"], {}))
        optimizer_settings.restore_settings(trainer, settings)
        scaler = getattr(trainer.accelerator, "scaler", None)
        if scaler is not None and state["scaler"] is not None:
            scaler.load_state_dict(unflatten(state["scaler"], {}))
        for name in COUNTERS:
            setattr(trainer, name, state["counters"][name])
        rank_state, rank_tensors = _read_rank(trainer, folder)
        device = trainer.accelerator.device
        trainer.rollout_buffer = unflatten(rank_state["buffered"], rank_tensors, device)
        if "choice" in rank_state:
            trainer.prompt_choice.load(unflatten(rank_state["choice"], rank_tensors))
        # The held-out data may have been removed from the run file since.
        pending = state["pending_evaluation"] is True
        trainer.pending_evaluation = pending and trainer.eval_dataset is not None


def load_generators(trainer: TrainerSeam, folder: Path) -> None:
    """Restore the random generators of this rank. Raises InputError if their state is unusable."""
    with _state_errors_translated(folder):
        rank_state, tensors = _read_rank(trainer, folder)
        restore_generators(rank_state["generators"], tensors)


@contextmanager
def _state_errors_translated(folder: Path) -> Iterator[None]:
    """A context manager for code that uses the content of a checkpoint. If the code fails,
    InputError is raised. The files are known to be undamaged, because their checksums were checked
    before. So the code fails only if another program or another release wrote the content.
    """
    try:
        yield
    except ToolkitError:
        raise
    except (
        ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError,
    ) as error:  # fmt: skip
        raise InputError(
            f"the state in the checkpoint cannot be used: {type(error).__name__}:"
            f" {first_line(error)}",
            where=str(folder),
            fix="resume from another checkpoint, or begin another run with --output-dir",
        ) from error


def is_toolkit_checkpoint(folder: Path) -> bool:
    """Return True if the toolkit wrote the checkpoint, even if the checkpoint is damaged. Return
    False for a checkpoint of plain transformers.
    """
    toolkit_files = (checkpoint.CHECKSUMS_FILE, STATE_FILE)
    return (
        any((folder / name).exists() for name in toolkit_files)
        or not (folder / "optimizer.pt").exists()
    )


def best_steps(run_dir: Path, count: int, branch: Branch | None = None) -> list[int]:
    """The steps of the ``count`` valid checkpoints with the highest score."""
    scored = []
    for step in valid_steps(run_dir, branch) if count > 0 else []:
        score = checkpoint.read_json(checkpoint.path_of(run_dir, step), STATE_FILE).get("score")
        if score is not None:
            scored.append((score, step))
    return [step for _, step in sorted(scored, reverse=True)[:count]]


def latest_reward(state: Any) -> float | None:
    """Return the last logged reward of an evaluation. Without an evaluation, return the last logged
    reward of training, or None.
    """
    for name in ("eval_reward", "reward"):
        for row in reversed(state.log_history):
            if row.get(name) is not None:
                return float(row[name])
    return None


def epochs_done(folder: Path) -> int:
    """Return the number of complete epochs before this checkpoint."""
    with _state_errors_translated(folder):
        return int(checkpoint.read_json(folder, TRAINER_STATE_FILE)["epoch"] or 0)


def step_of(folder: Path) -> int:
    """Return the number of optimizer steps before this checkpoint. Raises InputError if the number
    in the checkpoint is not a valid step.
    """
    with _state_errors_translated(folder):
        step = checkpoint.read_json(folder, TRAINER_STATE_FILE)["global_step"]
        if type(step) is not int or not 0 <= step <= _MAX_STEPS:
            raise ValueError(f"global_step is {step!r:.40}")
        return step


def _read_rank(trainer: TrainerSeam, folder: Path) -> tuple[Any, Tensors]:
    rank = trainer.accelerator.process_index
    tensors = _read_tensors(folder / f"rank-{rank}.safetensors")
    return checkpoint.read_json(folder, f"rank-{rank}.json"), tensors


def _read_tensors(file: Path) -> Tensors:
    return read_tensors(file, limit=MAX_DATA_BYTES)


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer without accelerate's wrapper."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner
