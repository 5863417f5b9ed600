"""Arrange the processes of a run for tensor parallelism (the mesh). Each group of N processes
shares one replica of the model, and each process has a part of every split parameter.

vLLM assigns the ranks (external_launcher, 0.25.1 and 0.31.0): ranks 0 to N-1 are the first group,
and the next N ranks are the second group. A group is vLLM's tensor-parallel group, and the trainer
uses it too.

accelerate, TRL and DistributedDataParallel treat torch.distributed's default group as the whole
run. So while a mesh is open, the default group of a process is its data-parallel group. This group
has one rank of each replica: the ranks that have the same part of the model.

vLLM creates its groups when the engine starts, from a default group that has all processes of the
run. So the order is: ``create_default_group``, the start of the engine, ``open_mesh``.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed
from torch.distributed import distributed_c10d

from toolkit.base.errors import DefectError
from toolkit.base.process_environment import rank, world_size

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.distributed import ProcessGroup
    from torch.distributed.distributed_c10d import Store


@dataclass(frozen=True, slots=True)
class Mesh:
    """The position of this process in the mesh.

    The processes of a run form ``replica_count`` groups of ``size`` processes. A group shares one
    model. ``replica`` is the number of this process's group, and ``rank`` is the number of this
    process in its group. ``group`` is the torch process group that transfers tensors on their
    device. ``host_group`` has the same processes, and transfers Python objects over the CPU.
    """

    size: int
    rank: int
    replica: int
    replica_count: int
    group: Any
    host_group: Any
    world_group: Any
    """The default group of all processes, as it was before the mesh was opened."""

    @property
    def is_first(self) -> bool:
        """Whether this process is the first of its group."""
        return self.rank == 0

    def broadcast_from_first(self, value: object) -> Any:
        """Return the ``value`` that the first process of the group passed. Every process of the
        group must call this method.
        """
        values = [value]
        distributed.broadcast_object_list(values, group_src=0, group=self.host_group)
        return values[0]

    def max_over_run(self, flag: int, device: torch.device) -> int:
        """Return the largest of the integers ``flag`` that the processes of the run pass. Every
        process of the run must call this method.
        """
        largest = torch.tensor([int(flag)], device=device)
        distributed.all_reduce(largest, op=distributed.ReduceOp.MAX, group=self.world_group)
        return int(largest)

    def broadcast_over_run(self, value: object) -> Any:
        """Return the ``value`` that the first process of the run passed. Every process of the run
        must call this method.
        """
        values = [value]
        distributed.broadcast_object_list(values, group_src=0, group=self.world_group)
        return values[0]

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return the ``tensor`` of each process of the group, in the order of the processes. All
        tensors must have the same shape.
        """
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        distributed.all_gather(parts, tensor.contiguous(), group=self.group)
        return parts

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add up ``tensor`` over the processes of the group, in place, and return it."""
        distributed.all_reduce(tensor, group=self.group)
        return tensor

    def combined_digest(self, digest: str) -> str:
        """Combine the digests of all processes of the group into one digest, and return it.
        ``digest`` is the digest of this process. Every process of the group must call this method.
        """
        digests: list[Any] = [None] * self.size
        distributed.all_gather_object(digests, digest, group=self.host_group)
        return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]

    def check_same(self, what: str, values: Sequence[Sequence[int]]) -> None:
        """Compare ``values`` (token ids) over the processes of the group.

        Raises:
            DefectError: the processes have sampled different tokens.
        """
        digest = hashlib.sha256(repr([list(row) for row in values]).encode()).hexdigest()
        digests: list[Any] = [None] * self.size
        distributed.all_gather_object(digests, digest, group=self.host_group)
        if len(set(digests)) > 1:
            raise DefectError(
                f"the {self.size} processes that share a model have sampled different {what}",
                where=f"process {rank()}",
                fix="run the same command again. The run resumes from the last checkpoint",
            )


_open_mesh: Mesh | None = None


def run_on_first(call: Callable[[], Any]) -> Any:
    """Return the result of ``call()``. If several processes share a model, only the first process
    runs ``call``, and all processes get its result.
    """
    if _open_mesh is None:
        return call()
    return _open_mesh.broadcast_from_first(call() if _open_mesh.is_first else None)


def current_mesh() -> Mesh | None:
    """Return the mesh of this process, or None if each process has a whole model."""
    return _open_mesh


def open_mesh(size: int) -> Mesh | None:
    """Open the mesh. It uses the tensor-parallel groups that vLLM has created. Every process of the
    run must call this function. Returns None if ``size`` is 1.
    """
    if size == 1:
        return None
    from vllm.distributed import parallel_state  # noqa: PLC0415 - the rest is for everybody

    global_rank = distributed.get_rank()
    model_group = parallel_state.get_tp_group()
    expected = [global_rank // size * size + index for index in range(size)]
    if list(model_group.ranks) != expected:
        raise DefectError(
            f"vLLM's tensor-parallel group of this process has the ranks {model_group.ranks}, but "
            f"must have the ranks {expected}"
        )
    return create_mesh(size, model_group.device_group, model_group.cpu_group)


def create_mesh(size: int, group: ProcessGroup | None, host_group: Any) -> Mesh:
    """Create and open the mesh in which the ``size`` processes of ``group`` share a model. Every
    process of the run must call this function.

    torch's default group is replaced. The new default group has one rank of each replica: the ranks
    that have the same part of the model as this process.
    """
    global _open_mesh
    processes, global_rank = distributed.get_world_size(), distributed.get_rank()
    data_parallel_group = None
    for rank_in_group in range(size):
        new_group = distributed.new_group(list(range(rank_in_group, processes, size)))
        data_parallel_group = (
            new_group if rank_in_group == global_rank % size else data_parallel_group
        )
    _open_mesh = Mesh(
        size=size,
        rank=global_rank % size,
        replica=global_rank // size,
        replica_count=processes // size,
        group=group,
        host_group=host_group,
        world_group=distributed.group.WORLD,
    )
    # In torch 2.11 and 2.13, functions that are called without a group read only this setting.
    distributed_c10d._update_default_pg(data_parallel_group)
    return _open_mesh


def close_mesh() -> None:
    """Make the group of all processes the default group again. A second call does nothing."""
    global _open_mesh
    if _open_mesh is not None:
        data_parallel_group = distributed.group.WORLD
        distributed_c10d._update_default_pg(_open_mesh.world_group)
        _open_mesh = None
        distributed.destroy_process_group(data_parallel_group)


COLLECTIVE_TIMEOUT_S = 1800.0
"""The seconds that a rank waits for the other ranks in a collective call. The value is the default
of ``ddp_timeout`` in transformers.
"""


def create_default_group(timeout_s: float | None = None, store: Store | None = None) -> None:
    """Create the default group of all processes of the run. It uses NCCL if there is a GPU, else
    gloo.

    Does nothing in a run of one process, or if the default group already exists. If ``store`` is
    None, the processes connect at ``MASTER_ADDR``. Raises RuntimeError if they cannot connect.
    """
    if world_size() == 1 or distributed.is_initialized():
        return
    distributed.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        timeout=timedelta(seconds=timeout_s or COLLECTIVE_TIMEOUT_S),
        rank=rank(),
        world_size=world_size(),
        store=store,
    )


def gather_from_all(value: object) -> list[Any]:
    """Return the ``value`` of each process of the run, by rank. Every process must call this
    function. The function creates the default group if it does not exist.

    The values are sent over the CPU, because this process has not chosen its GPU yet.
    """
    if world_size() == 1:
        return [value]
    create_default_group()
    group = distributed.new_group(backend="gloo")
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value, group=group)
    distributed.destroy_process_group(group)
    return values
