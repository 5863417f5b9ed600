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

from toolkit.engine import lora_kernels  # noqa: E402
from toolkit.engine.kernel_compile import compiled_together  # noqa: E402
from toolkit.engine.lora_tables import LayerShape  # noqa: E402

SHAPE, ANOTHER_SHAPE = LayerShape((512, 128, 128), 512, 16), LayerShape((64,), 72, 16)
GRAPH_SIZES, MAX_TOKENS = (1, 2, 4, 8, 16, 24), 600
OTHER_SIZES = (3, 5, 20, 32, 77, 112, 300, 304, 599, 600)

compiled: list[str] = []
needed_launchers: list[str] = []


def record(*_: object, **facts: Any) -> None:
    compiled.append(facts["fn"].name)
    needed_launchers.append(make_launcher({}, facts["compile"]["signature"], None))


triton.knobs.runtime.jit_post_compile_hook = record
torch.set_default_dtype(torch.bfloat16)  # as vLLM does while it loads a model


def slots(shape: LayerShape, sizes: tuple[int, ...]) -> lora_kernels.LoraSlots:
    return lora_kernels.LoraSlots(
        shapes=frozenset({shape}), max_loras=1, dtype=torch.bfloat16, batch_sizes=sizes
    )


def compile_again(shape: LayerShape, sizes: tuple[int, ...]) -> list[str]:
    """Return the names of the kernels that are compiled for these sizes now."""
    before = len(compiled)
    with compiled_together() as add_variant:
        lora_kernels.call_for_all_layers(slots(shape, sizes), add_variant)
    return compiled[before:]


sizes = lora_kernels.sizes_with_all_variants(GRAPH_SIZES, MAX_TOKENS)
lora_kernels.compile_lora_kernels(slots(SHAPE, sizes))
ahead = list(compiled)
launchers_missing = len(set(needed_launchers) - set(launchers))
launchers_ahead = len(launchers)
json.dump(
    {
        "ahead": ahead,
        "later": compile_again(SHAPE, (*GRAPH_SIZES, *OTHER_SIZES)),
        "launchers": launchers_ahead,
        "launchers_missing": launchers_missing,
        "another_shape": compile_again(ANOTHER_SHAPE, (16,)),
    },
    sys.stdout,
)
