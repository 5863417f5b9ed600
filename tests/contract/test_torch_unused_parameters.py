"""torch raises an error if several processes train a parameter that does not affect the loss. The
error of the run names the key that makes torch search for such parameters.
"""

from __future__ import annotations

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from toolkit.train.step.step_errors import translate

pytestmark = pytest.mark.contract


class ModelWithUnusedLayer(nn.Module):
    """A model that uses only one of its two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


@pytest.fixture
def group():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def two_steps(*, find_unused_parameters: bool) -> None:
    model = DistributedDataParallel(
        ModelWithUnusedLayer(), find_unused_parameters=find_unused_parameters
    )
    for _ in range(2):
        model(torch.ones(1, 2)).sum().backward()


def test_the_error_for_an_unused_parameter_names_the_key_to_set(group):
    two_steps(find_unused_parameters=True)
    with pytest.raises(RuntimeError) as caught:
        two_steps(find_unused_parameters=False)
    error = translate(caught.value, "step 2")
    assert error is not None
    assert error.exit_code == 1
    assert "ddp_find_unused_parameters: true" in str(error.fix)
