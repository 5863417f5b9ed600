"""The constants of sizing agree with a real GPU: CUDA's total memory and the memory of a
context.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from toolkit.gpu.devices import select_device
from toolkit.gpu.snapshot import take_snapshot
from toolkit.sizing import Device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not Path("/proc/driver/nvidia/version").exists(), reason="no NVIDIA driver is loaded here"
    ),
]

CONTEXT = """
import torch
from toolkit.gpu.devices import select_device
from toolkit.gpu.snapshot import take_snapshot
before = select_device(take_snapshot()).free_bytes
torch.ones(1024, device="cuda") @ torch.ones(1024, 1, device="cuda")
torch.cuda.synchronize()
free, total = torch.cuda.mem_get_info()
print(before - free - torch.cuda.memory_reserved(), total)
"""


def test_total_and_context_memory_agree_with_the_constants() -> None:
    snapshot = take_snapshot()
    gpu = select_device(snapshot)
    assert gpu is not None
    device = Device.from_node(snapshot, gpu)
    result = subprocess.run(
        [sys.executable, "-c", CONTEXT], capture_output=True, text=True, check=True
    )
    context, total = map(int, result.stdout.split())
    assert device.cuda_total_bytes == pytest.approx(total, rel=0.003)
    # Libraries load more memory as they are used. Outside these limits the constant is wrong.
    assert 0.5 * device.context_bytes <= context <= 1.2 * device.context_bytes
