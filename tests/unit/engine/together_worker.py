"""One of two processes that agree on what they repeat. Started by test_engine_together.py."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from toolkit.base.errors import ConfigError
from toolkit.engine import mesh as meshes
from toolkit.engine import together
from toolkit.engine.mesh import Mesh
from toolkit.engine.together import generate_together, repeatable_phase, watch_peers

if TYPE_CHECKING:
    from collections.abc import Callable

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB"


def summed(shared: Mesh) -> int:
    """A collective of the group, as the layers of a split model make it."""
    one = torch.ones(1)
    together.check_peers()
    distributed.all_reduce(one, group=shared.group)
    return int(one)


def outcome(call: Callable[[], Any]) -> Any:
    """What a call returns, or the kind of error that it raises."""
    try:
        return call()
    except (RuntimeError, ConfigError) as error:
        return type(error).__name__, str(error).partition("\n")[0]


def step(shared: Mesh, fail_after: int | None) -> int:
    """Three sums in a phase; this process runs out of memory after ``fail_after`` of them."""
    with repeatable_phase():
        watch_peers()
        found = 0
        for number in range(3):
            if number == fail_after:
                raise torch.OutOfMemoryError(FULL)
            found = summed(shared)
        if fail_after == 3:
            raise torch.OutOfMemoryError(FULL)
        return found


def main() -> dict[str, Any]:
    distributed.init_process_group("gloo")
    number = distributed.get_rank()
    group = distributed.new_group([0, 1])
    shared = Mesh(2, number, 0, 1, group, distributed.group.WORLD, distributed.group.WORLD)
    meshes._open_mesh = shared
    found: dict[str, Any] = {}
    for name, failures in {
        "none": (None, None),
        "first": (0, None),
        "middle": (None, 1),
        "end": (3, None),
        "both": (1, 1),
    }.items():
        found[name] = outcome(partial(step, shared, failures[number]))
        found[f"{name}, then"] = outcome(lambda: step(shared, None))

    def draw(fails: bool) -> str:
        if fails:
            raise torch.OutOfMemoryError(FULL)
        return "drawn"

    found["rollout"] = outcome(lambda: generate_together(shared, lambda: draw(False)))
    found["rollout fails"] = outcome(lambda: generate_together(shared, lambda: draw(number == 0)))
    found["rollout fails in both"] = outcome(lambda: generate_together(shared, lambda: draw(True)))
    together.PEER_TIMEOUT_S = 0.5
    if number == 1:  # the other waits for it in a collective
        found["alone"] = outcome(lambda: generate_together(shared, lambda: draw(True)))
        return found
    found["alone"] = outcome(lambda: generate_together(shared, lambda: summed(shared)))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main()), flush=True)
