"""Compute how much memory a run needs, only from config.json and safetensors headers.

The package never imports torch. Training calls ``resolve(config, device)``, which reads the model,
computes the sizes, and replaces every "auto" in the run file.
"""

from __future__ import annotations

from toolkit.sizing.device import Device
from toolkit.sizing.lora_bytes import fused_shapes
from toolkit.sizing.model_blocks import ModelSpec
from toolkit.sizing.result import SizingResult
from toolkit.sizing.solve import resolve, resolve_for_all, solve
from toolkit.sizing.spec import read_spec

__all__ = [
    "Device",
    "ModelSpec",
    "SizingResult",
    "fused_shapes",
    "read_spec",
    "resolve",
    "resolve_for_all",
    "solve",
]
