"""A worker process: one of two that agree on the steps and rollouts that they repeat. Started by
test_oom_agreement.py.
"""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from toolkit.base.errors import ConfigError
from toolkit.engine import mesh as meshes
from toolkit.engine import oom_agreement
from toolkit.engine.mesh import Mesh
from toolkit.engine.oom_agreement import generate_together, repeatable_phase, watch_peers

if TYPE_CHECKING:
    from collections.abc import Callable

OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB"


def all_reduce_in_group(mesh: Mesh) -> int:
    """An all-reduce in the group, as the layers of a split model do."""
    tensor = torch.ones(1)
    oom_agreement.check_peers()
    distributed.all_reduce(tensor, group=mesh.group)
    return int(tensor)


def result_or_error(call: Callable[[], Any]) -> Any:
    """The result of a call, or the class name and first line of its error."""
    try:
        return call()
    except (RuntimeError, ConfigError) as error:
        return type(error).__name__, str(error).partition("\n")[0]


def run_step(mesh: Mesh, fail_after: int | None) -> int:
    """Three all-reduces in a phase. This process runs out of memory after ``fail_after`` of
    them.
    """
    with repeatable_phase():
        watch_peers()
        total = 0
        for number in range(3):
            if number == fail_after:
                raise torch.OutOfMemoryError(OUT_OF_MEMORY)
            total = all_reduce_in_group(mesh)
        if fail_after == 3:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        return total


def main() -> dict[str, Any]:
    distributed.init_process_group("gloo")
    number = distributed.get_rank()
    group = distributed.new_group([0, 1])
    mesh = Mesh(2, number, 0, 1, group, distributed.group.WORLD, distributed.group.WORLD)
    meshes._open_mesh = mesh
    results: dict[str, Any] = {}
    for name, failures in {
        "none": (None, None),
        "first": (0, None),
        "middle": (None, 1),
        "end": (3, None),
        "both": (1, 1),
    }.items():
        results[name] = result_or_error(partial(run_step, mesh, failures[number]))
        results[f"{name}, then"] = result_or_error(lambda: run_step(mesh, None))

    def draw(fails: bool) -> str:
        if fails:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        return "drawn"

    results["rollout"] = result_or_error(lambda: generate_together(mesh, lambda: draw(False)))
    results["rollout fails"] = result_or_error(
        lambda: generate_together(mesh, lambda: draw(number == 0))
    )
    results["rollout fails in both"] = result_or_error(
        lambda: generate_together(mesh, lambda: draw(True))
    )
    oom_agreement.PEER_TIMEOUT_S = 0.5
    if number == 1:  # process 0 waits for this process in a collective
        results["alone"] = result_or_error(lambda: generate_together(mesh, lambda: draw(True)))
        return results
    results["alone"] = result_or_error(
        lambda: generate_together(mesh, lambda: all_reduce_in_group(mesh))
    )
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main()), flush=True)
