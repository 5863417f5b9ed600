"""Read environment variables that other programs set for this process. torchrun sets the rank and
the world size; if its variables are not set, the world size is 1. The settings of torch's CUDA
allocator are read too.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from toolkit.base.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""torch's variable for its CUDA allocator, and the older name of that variable."""
EXPANDABLE_SEGMENTS = "expandable_segments:True"


def has_expandable_segments(setting: str) -> bool:
    """Whether ``setting`` turns on expandable_segments. ``setting`` is the value of an environment
    variable for torch's CUDA allocator (one of ``ALLOCATOR_VARIABLES``).
    """
    return EXPANDABLE_SEGMENTS.lower() in setting.lower().replace(" ", "")


def world_size(environ: Mapping[str, str] = os.environ) -> int:
    """The number of processes of the whole run. Raises InputError for an invalid number."""
    return _read_number(environ, "WORLD_SIZE", minimum=1)


def local_world_size(environ: Mapping[str, str] = os.environ) -> int:
    """The number of processes of this run on this node, from LOCAL_WORLD_SIZE. If LOCAL_WORLD_SIZE
    is not set, WORLD_SIZE is used, the number of processes on all nodes. Raises InputError.
    """
    name = "LOCAL_WORLD_SIZE" if environ.get("LOCAL_WORLD_SIZE") else "WORLD_SIZE"
    return _read_number(environ, name, minimum=1)


def rank(environ: Mapping[str, str] = os.environ) -> int:
    """The rank of this process among all processes. Raises InputError."""
    return _read_number(environ, "RANK", minimum=0)


def local_rank(environ: Mapping[str, str] = os.environ) -> int:
    """The rank of this process on its node, which is also the index of its GPU. Raises InputError
    if LOCAL_RANK is not a valid number.
    """
    return _read_number(environ, "LOCAL_RANK", minimum=0)


def node_count(environ: Mapping[str, str] = os.environ) -> int:
    """The number of nodes of the run, from torchrun's variable PET_NNODES; 1 if it is not set.
    Raises InputError for an invalid number.
    """
    return _read_number(environ, "PET_NNODES", minimum=1)


def node_rank(environ: Mapping[str, str] = os.environ) -> int:
    """The number of this node among the nodes of the run, from 0 (torchrun's variable
    PET_NODE_RANK). Raises InputError.
    """
    return _read_number(environ, "PET_NODE_RANK", minimum=0)


def _read_number(environ: Mapping[str, str], name: str, *, minimum: int) -> int:
    """The value of a variable as an integer of at least ``minimum``; ``minimum`` if it is not set.
    Raises InputError.
    """
    text = environ.get(name) or str(minimum)
    if not re.fullmatch(r"[0-9]{1,6}", text) or int(text) < minimum:
        raise InputError(
            f"{name}={text} must be a whole number of at least {minimum}",
            where="the environment",
            fix=f"start the run with torchrun or --nproc-per-node, or unset the variable {name}",
        )
    return int(text)
