"""Compile the Triton kernels of a list that was recorded in a run on a GPU.

vLLM's model runner, TRL's loss and liger-kernel launch about 25 variants of kernels in the start
and the first step of a run. Each file in ``recorded/`` has these variants for one version of vLLM.
``tests/gpu/record_kernels.py`` writes such a file. Triton's ``JITFunction.preload`` compiles a
variant from its record (Triton 3.6).

Some constants of liger-kernel's kernels are sizes of the model. A record has the name of the size
instead of its value, such as ``{"power_of_2": "hidden_size"}``.

An outdated record does no harm: its kernel is compiled, but not used. So the versions of TRL and
liger-kernel are not checked here.
"""

from __future__ import annotations

import json
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.base.files import read_json
from toolkit.config.lora_targets import get_text_config
from toolkit.engine.kernel_compile import compiled_together

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def records_file(vllm_version: str) -> Path:
    """Return the path of the list that was recorded with a version of vLLM. The file exists only
    for some versions.
    """
    return Path(__file__).parent / "recorded" / f"vllm-{vllm_version}.json"


def read_sizes(folder: Path) -> dict[str, int]:
    """Return the sizes of the model in ``folder`` that records may name. Raises InputError if
    config.json cannot be read.
    """
    config = get_text_config(read_json(folder / "config.json"))
    sizes = {name: value for name, value in config.items() if isinstance(value, int)}
    heads = sizes.get("num_attention_heads", 1)
    sizes.setdefault("num_key_value_heads", heads)
    sizes.setdefault("head_dim", sizes.get("hidden_size", 0) // heads)
    return sizes


def compile_recorded_kernels(sizes: Mapping[str, int]) -> None:
    """Compile kernels that were recorded with the installed version of vLLM. With ``sizes`` of a
    model, these are the kernels that depend on the model. If ``sizes`` is empty, these are the
    other kernels. A kernel that does not compile is left out.
    """
    path = records_file(version("vllm"))
    if not path.is_file():
        return
    with compiled_together() as add_variant:
        for record in read_json(path)["kernels"]:
            if names_sizes(record) != bool(sizes):
                continue
            try:
                kernel: Any = getattr(import_module(record["module"]), record["kernel"])
                while not hasattr(kernel, "preload"):
                    kernel = kernel.fn  # a decorator, such as triton.heuristics
                add_variant(kernel.preload(json.dumps(fill_sizes(record["variant"], sizes))))
            except Exception:  # noqa: BLE001 - the kernel is then compiled when it is launched
                continue


def names_sizes(record: dict[str, Any]) -> bool:
    """Whether a constant of the record is a size of the model."""
    return any(isinstance(value, dict) for value in record["variant"]["constant_vals"])


def fill_sizes(value: Any, sizes: Mapping[str, int]) -> Any:
    """Return a copy of ``value`` (a part of a record) with numbers in place of names of sizes.
    Raises KeyError if the model has no such size.
    """
    if isinstance(value, list):
        return [fill_sizes(item, sizes) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((function, name),) = value.items()
        if function in SIZE_FUNCTIONS:
            return SIZE_FUNCTIONS[function](sizes[name])
    return {key: fill_sizes(item, sizes) for key, item in value.items()}


def _power_of_2(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


def _warps(size: int) -> int:
    """Return the number of warps that liger-kernel uses for rows of ``size`` columns (0.8.5,
    ``calculate_settings``).
    """
    block = _power_of_2(size)
    return next(
        (warps for least, warps in ((32768, 32), (8192, 16), (2048, 8)) if block >= least), 4
    )


SIZE_FUNCTIONS: Mapping[str, Callable[[int], int]] = {
    "size": int,
    "power_of_2": _power_of_2,
    "warps": _warps,
}
"""What a record can compute from a size: the size itself, the next power of two, and the number of
warps for rows of this size.
"""
