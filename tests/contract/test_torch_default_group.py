"""torch's default process group can be replaced. A mesh replaces it with the group of the replicas,
and ``close_mesh`` restores the group of all processes.
"""

from __future__ import annotations

import pytest
import torch
from torch import distributed
from torch.distributed import distributed_c10d

from toolkit.engine import mesh

pytestmark = pytest.mark.contract


@pytest.fixture
def world():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.group.WORLD
    distributed.destroy_process_group()


def test_functions_without_a_group_use_the_replaced_one(world) -> None:
    other = distributed.new_group([0])
    distributed_c10d._update_default_pg(other)
    assert distributed.group.WORLD is other
    assert distributed_c10d._get_default_group() is other
    values = torch.ones(2)
    distributed.all_reduce(values)
    assert values.tolist() == [1.0, 1.0]
    distributed_c10d._update_default_pg(world)
    distributed.destroy_process_group(other)
    assert distributed.group.WORLD is world


def test_a_mesh_replaces_the_default_group_and_restores_it(world) -> None:
    opened = mesh.create_mesh(1, world, world)
    assert opened.world_group is world
    assert distributed.group.WORLD is not world
    mesh.close_mesh()
    assert distributed.group.WORLD is world
    mesh.close_mesh()  # a second call does nothing
    assert distributed.group.WORLD is world
