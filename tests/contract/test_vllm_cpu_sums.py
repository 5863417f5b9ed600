"""vLLM's CPU communicator, as the engines of a group use it: after ``use_gloo_all_reduce`` it sums
with torch.distributed and not in shared memory.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import distributed

pytestmark = pytest.mark.contract
if find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)

from vllm.distributed.device_communicators import cpu_communicator  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402

from toolkit.engine.start import use_gloo_all_reduce  # noqa: E402

if not current_platform.is_cpu():
    pytest.skip("not the CPU engine", allow_module_level=True)


@pytest.fixture
def group():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.group.WORLD
    distributed.destroy_process_group()


def test_a_group_sums_with_torch_distributed(group, monkeypatch) -> None:
    communicator_class = cpu_communicator.CpuCommunicator
    name = "_all_group_ranks_share_shm_group_name"
    # monkeypatch restores the method after the test.
    monkeypatch.setattr(communicator_class, name, getattr(communicator_class, name))

    use_gloo_all_reduce()

    communicator = communicator_class(group, torch.device("cpu"), group, "tp:0")
    assert communicator.dist_module is distributed
    assert communicator.all_reduce(torch.ones(2)).tolist() == [1.0, 1.0]
