"""The process group of a run that torchrun or srun started in several processes.

The vLLM engine of each rank is independent of the others, but it creates its groups from the
default group. So the default group must exist before an engine starts.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import distributed

from toolkit.base.process_environment import rank, world_size

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store


TIMEOUT_S = 1800.0
"""How long a rank waits for another one in a collective call; transformers' default of
``ddp_timeout``.
"""


def join_group(timeout_s: float | None = None, store: Store | None = None) -> None:
    """Create the default group of all processes of the run: NCCL with a GPU, else gloo.

    Does nothing in a run of one process, or if the group already exists. With ``store`` None, the
    rendezvous is at ``MASTER_ADDR``. Raises RuntimeError.
    """
    if world_size() == 1 or distributed.is_initialized():
        return
    distributed.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        timeout=timedelta(seconds=timeout_s or TIMEOUT_S),
        rank=rank(),
        world_size=world_size(),
        store=store,
    )
