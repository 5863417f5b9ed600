"""Train the small model of ``train_world`` with several ranks. Each rank is a forked process."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import torch
import train_world as world
from safetensors.torch import load_file

from toolkit.train.launch import child_environment, free_port

if TYPE_CHECKING:
    from pathlib import Path

SLOW_REWARDS = """\
import time

def ones(completions, **_):
    time.sleep(0.1)
    return [c.count("1") / max(1, len(c)) for c in completions]
"""
FAILING_REWARDS = """\
import os

def ones(completions, trainer_state=None, **_):
    if os.environ.get("RANK") == "1" and trainer_state.global_step >= 2:
        raise ValueError("the reward of process 1")
    return [c.count("1") / max(1, len(c)) for c in completions]
"""


def start_ranks(
    run_file: Path, run_dir: Path, *overrides: str, size: int = 2, before=None
) -> list[int]:
    """Fork the ranks of a run; return their pids. Rank N prints to the file ``run_dir``-N.txt."""
    port = free_port()

    def rank(number: int):
        def begin() -> None:
            os.environ.update(child_environment(number, size, port))
            from toolkit.train import process_control

            process_control.ANSWER_TIMEOUT_S = 1.0
            record_logs(run_dir.with_name(f"{run_dir.name}-{number}.jsonl"))
            if before is not None:
                before(number)

        return begin

    output_override = f'runtime.output_dir="{run_dir}"'
    return [
        world.fork_run(
            run_file, output_path(run_dir, n), output_override, *overrides, before=rank(n)
        )
        for n in range(size)
    ]


def output_path(run_dir: Path, number: int) -> Path:
    return run_dir.with_name(f"{run_dir.name}-{number}.txt")


def printed_by_ranks(run_dir: Path, size: int = 2) -> str:
    """The output of all ranks."""
    paths = [output_path(run_dir, number) for number in range(size)]
    return "".join(path.read_text() for path in paths if path.exists())


def record_logs(path: Path) -> None:
    """Have the trainer of this process append its logs to ``path``, except times.

    After the training, it also appends the sum of each adapter tensor.
    """
    from transformers import Trainer

    from toolkit.train.checkpointing.state_files import trainable_parameters

    log, train = Trainer.log, Trainer.train

    def noted(line: object) -> None:
        with path.open("a") as handle:
            handle.write(json.dumps(line) + "\n")

    def logged(trainer, logs, *args, **kwargs):
        if "train_runtime" not in logs:
            noted({name: value for name, value in logs.items() if "time" not in name})
        return log(trainer, logs, *args, **kwargs)

    def trained(trainer, *args, **kwargs):
        end = train(trainer, *args, **kwargs)
        model = trainer.accelerator.unwrap_model(trainer.model)
        noted(
            {
                name: p.detach().double().sum().item()
                for name, p in trainable_parameters(model).items()
            }
        )
        return end

    Trainer.log, Trainer.train = logged, trained


def adapter_distance(one: Path, other: Path) -> float:
    """The largest absolute difference between an element of two adapters."""
    mine, theirs = (load_file(d / "adapter/adapter_model.safetensors") for d in (one, other))
    assert set(mine) == set(theirs)
    return max((mine[name] - theirs[name]).abs().max().item() for name in mine)


def largest_weight(run_dir: Path) -> float:
    """The largest element of an adapter, to compare ``adapter_distance`` with."""
    tensors = load_file(run_dir / "adapter/adapter_model.safetensors").values()
    return max(torch.max(tensor.abs()).item() for tensor in tensors)
