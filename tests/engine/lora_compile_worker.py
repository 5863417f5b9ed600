"""Compile the LoRA kernels for an H100 on a machine without a GPU, and print what was compiled.

Triton compiles without a GPU, but asks a driver for the GPU's architecture. This program gives
Triton a driver that only answers this question. It has its own process, because it makes vLLM
believe that Triton can be used.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from typing import Any

import torch
import triton
from triton.backends import Backend, backends
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import make_launcher

version = importlib.metadata.version
importlib.metadata.version = lambda name: "0.31.0" if name == "vllm" else version(name)


class Driver:
    """The answers of the driver of an H100."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    @staticmethod
    def is_active() -> bool:
        return True

    def launcher_cls(self, source: Any, metadata: Any) -> None:
        launchers.append(make_launcher({}, source.signature, None))


launchers: list[str] = []  # the C sources of the launchers that were built

triton.runtime.driver.set_active(Driver())
compiler = backends["nvidia"].compiler
backends.clear()
backends["nvidia"] = Backend(compiler=compiler, driver=Driver)

import vllm.utils.torch_utils  # noqa: E402 - after Triton has a driver

vllm.utils.torch_utils.PIN_MEMORY = False

from toolkit.engine import lora_compile  # noqa: E402
from toolkit.engine.lora_tables import LayerShape  # noqa: E402

SHAPES = {LayerShape((512, 128, 128), 512, 16)}
GRAPH_SIZES, MAX_TOKENS = (1, 2, 4, 8, 16, 24), 600
OTHER_SIZES = (3, 5, 20, 32, 77, 112, 300, 304, 599, 600)

compiled: list[str] = []
needed_launchers: list[str] = []


def record(*_: object, **facts: Any) -> None:
    compiled.append(facts["fn"].name)
    needed_launchers.append(make_launcher({}, facts["compile"]["signature"], None))


triton.knobs.runtime.jit_post_compile_hook = record
torch.set_default_dtype(torch.bfloat16)  # as vLLM does while it loads a model
sizes = lora_compile.batch_sizes(GRAPH_SIZES, MAX_TOKENS)
lora_compile.compile_kernels(SHAPES, sizes, 1, torch.bfloat16)
ahead = len(compiled)
launchers_missing = len(set(needed_launchers) - set(launchers))

shrink = lora_compile._CompilingCopy("lora_shrink_op", "_lora_shrink")
expand = lora_compile._CompilingCopy("lora_expand_op", "_lora_expand")
for shape in SHAPES:
    for tokens in (*GRAPH_SIZES, *OTHER_SIZES):
        lora_compile._call(shrink, expand, shape, tokens, 1, torch.bfloat16)
later = compiled[ahead:]
lora_compile._call(shrink, expand, LayerShape((64,), 72, 16), 16, 1, torch.bfloat16)
json.dump(
    {
        "ahead": compiled[:ahead],
        "later": later,
        "launchers": len(launchers),
        "launchers_missing": launchers_missing,
        "another_shape": compiled[ahead + len(later) :],
    },
    sys.stdout,
)
