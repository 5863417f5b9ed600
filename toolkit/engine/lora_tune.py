"""Measure configurations of vLLM's LoRA kernels on this GPU, and make a table of the fastest.

vLLM has two LoRA kernels: shrink multiplies by A, and expand multiplies by B. The search runs once
for each kernel, layer shape and batch size. It starts from vLLM's own configuration and changes one
value at a time. A changed configuration is kept only if it is faster and computes the same result.
Batches of more than ``MAX_TUNED_TOKENS`` tokens keep vLLM's configuration. The search sets a
configuration through vLLM's own table files (``engine.lora_tables``). It times the kernel in a
captured CUDA graph. In decode steps, the weights of the kernel are not in the GPU's cache. So the
graph uses the weights of many layers, which do not fit into this cache.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import vllm
from vllm.lora.ops.triton_ops import lora_expand, lora_shrink
from vllm.lora.ops.triton_ops import utils as upstream
from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta

from toolkit.base.errors import NodeError
from toolkit.engine.lora_kernels import clear_pointer_cache
from toolkit.engine.lora_tables import (
    FOLDER_VARIABLE,
    PREFILL_BATCH_SIZES,
    TUNED_BATCH_SIZES,
    LayerShape,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

MAX_TUNED_TOKENS = TUNED_BATCH_SIZES[-1]
MAX_LORAS = 1
MAX_SLICES = 8
"""The largest number of fused slices in the table. The table has an entry for every number up to
this one, because vLLM 0.25.1 fails if an entry is missing.
"""
SEARCH_SPACE: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "shrink": {
        "split_k": (4, 8, 16, 32, 64),
        "block_k": (64, 128, 256, 512),
        "block_n": (16, 32, 64),
        "block_m": (16, 32, 64),
        "num_warps": (2, 4, 8),
        "num_stages": (2, 3, 4),
    },
    "expand": {
        "block_n": (32, 64, 128, 256),
        "block_m": (16, 32, 64),
        "block_k": (16, 32, 64, 128),
        "num_warps": (2, 4, 8),
        "num_stages": (1, 2, 3, 4),
    },
}
REPEATS = 5
MIN_WEIGHT_BYTES = 128 << 20
"""The minimum number of weight bytes that one measurement reads. It is larger than a GPU's cache,
and the weights of several layers are used to reach it.
"""


@dataclass(slots=True)
class Tuner:
    """Measures the kernels. ``max_seconds`` limits the total time. Kernels that are not measured
    within this time keep vLLM's own configuration.
    """

    card: str
    max_seconds: float = 600.0
    report: Callable[[str], None] = lambda _: None
    best_configs: dict[tuple[str, int, int, int, int], dict[str, Any]] = field(default_factory=dict)
    timings: list[tuple[str, LayerShape, int, float, float]] = field(default_factory=list)

    def tune(self, shapes: Sequence[LayerShape]) -> dict[str, Any]:
        """Measure the kernels of ``shapes``, and return the table that ``lora_tables.write_table``
        writes.
        """
        deadline = time.monotonic() + self.max_seconds
        with tempfile.TemporaryDirectory(prefix="toolkit-tune-") as folder:
            # The batch sizes of rollouts come first, in case the time is too short for all.
            for batch in sorted(TUNED_BATCH_SIZES, key=lambda size: (size not in (8, 64), size)):
                for shape in shapes:
                    for op in ("shrink", "expand"):
                        self._tune_kernel(op, shape, batch, Path(folder), deadline)
        return self.build_table(shapes)

    def _tune_kernel(
        self, op: str, shape: LayerShape, batch: int, folder: Path, deadline: float
    ) -> None:
        case = KernelBenchmark(op, shape, batch, folder, self.card)
        config = case.default_config()
        expected = case.run(config)
        default_seconds = best_seconds = case.measure_seconds(config)
        for name, values in SEARCH_SPACE[op].items():
            for value in values:
                if time.monotonic() > deadline or config[name] == value:
                    continue
                candidate = {**config, name: value}
                seconds = case.measure_if_correct(candidate, expected)
                if seconds is not None and seconds < 0.98 * best_seconds:
                    config, best_seconds = candidate, seconds
        input_size, output_size = (
            (shape.in_features, shape.rank) if op == "shrink" else (shape.rank, shape.out_features)
        )
        self.best_configs[op, shape.slices, batch, input_size, output_size] = config
        self.timings.append((op, shape, batch, default_seconds, best_seconds))
        self.report(
            f"LoRA kernel {op}, {shape.slices} slices of ({output_size}, {input_size}), {batch} "
            f"tokens: {default_seconds * 1e6:.1f} us with the configuration of vLLM, "
            f"{best_seconds * 1e6:.1f} us with the best one"
        )

    def build_table(self, shapes: Iterable[LayerShape]) -> dict[str, Any]:
        """Return the table of the best configurations, nested as vLLM reads it. The levels are the
        number of adapters, the number of slices, the number of tokens, the input size, and the
        output size.
        """
        ops: dict[str, Any] = {}
        for shape in shapes:
            for batch in PREFILL_BATCH_SIZES:
                for op in ("shrink", "expand"):
                    sizes = (
                        (shape.in_features, shape.rank)
                        if op == "shrink"
                        else (shape.rank, shape.out_features)
                    )
                    self.best_configs[op, shape.slices, batch, *sizes] = default_config(
                        op, shape, batch
                    )
        for op in ("shrink", "expand"):
            slices: dict[str, Any] = {}
            for (kind, count, batch, input_size, output_size), config in self.best_configs.items():
                if kind == op:
                    rows = slices.setdefault(str(count), {}).setdefault(str(batch), {})
                    rows.setdefault(str(input_size), {})[str(output_size)] = config
            measured_counts = sorted(int(count) for count in slices)
            for count in range(1, MAX_SLICES + 1):
                nearest = min(measured_counts, key=lambda measured: abs(measured - count))
                slices.setdefault(str(count), slices[str(nearest)])
            ops[op] = {str(MAX_LORAS + 1): slices}
        return {
            "vllm": vllm.__version__,
            "card": self.card,
            "SHRINK": ops["shrink"],
            "EXPAND_TRUE": ops["expand"],
            "EXPAND_FALSE": ops["expand"],
        }


def tune_card(
    shapes: Iterable[LayerShape], max_seconds: float, report: Callable[[str], None]
) -> tuple[dict[str, Any], float, float]:
    """Measure the kernels of ``shapes`` on this machine's GPU.

    Returns the table, the total seconds of all kernels before tuning, and the total seconds after
    tuning.

    Raises:
        NodeError: there is no CUDA GPU.
    """
    if not torch.cuda.is_available():
        raise NodeError(
            "no CUDA GPU is visible, but the kernels must be measured on a GPU",
            where="tune",
            fix="run `toolkit tune` on a machine with the kind of GPU that will train",
        )
    tuner = Tuner(torch.cuda.get_device_name(), max_seconds, report)
    table = tuner.tune(sorted(shapes))
    before = sum(default for _, _, _, default, _ in tuner.timings)
    return table, before, sum(tuned for _, _, _, _, tuned in tuner.timings)


def default_config(op: str, shape: LayerShape, batch: int) -> dict[str, Any]:
    """Return the kernel configuration that vLLM uses without a table."""
    os.environ.pop(FOLDER_VARIABLE, None)
    clear_vllm_caches()
    return dict(
        upstream.get_lora_op_configs(
            op,
            max_loras=MAX_LORAS + 1,
            batch=batch,
            hidden_size=shape.in_features if op == "shrink" else shape.out_features,
            rank=shape.rank,
            num_slices=shape.slices,
            add_inputs=None if op == "shrink" else True,
        )
    )


def clear_vllm_caches() -> None:
    """Clear vLLM's caches of its table files, so that vLLM reads the files again."""
    upstream.load_lora_op_config.cache_clear()
    upstream.get_lora_op_configs.cache_clear()


class KernelBenchmark:
    """A measurement of one LoRA kernel with one layer shape and one batch size. All tokens of the
    batch use the same adapter.
    """

    def __init__(self, op: str, shape: LayerShape, batch: int, folder: Path, card: str) -> None:
        self.op, self.shape, self.batch, self.folder, self.card = op, shape, batch, folder, card
        clear_pointer_cache()
        device, dtype = torch.device("cuda"), torch.bfloat16
        if op == "shrink":
            sizes = [(shape.rank, shape.in_features)] * shape.slices
        else:
            sizes = [(rows, shape.rank) for rows in shape.rows]
        layer_bytes = 2 * sum(rows * columns for rows, columns in sizes)
        self.layers = [
            [torch.randn(MAX_LORAS, 1, *size, device=device, dtype=dtype) * 0.02 for size in sizes]
            for _ in range(max(4, min(64, MIN_WEIGHT_BYTES // layer_bytes)))
        ]
        rank_shape = (shape.slices, batch, shape.rank)
        self.rank_tensor = torch.randn(rank_shape, device=device, dtype=torch.float32)
        hidden_size = shape.in_features if op == "shrink" else sum(shape.rows)
        self.hidden_tensor = torch.randn(batch, hidden_size, device=device, dtype=dtype)
        self.metadata = LoRAKernelMeta.make(MAX_LORAS, batch, device=device)
        self.metadata.prepare_tensors(torch.zeros(batch, dtype=torch.int32, device=device))

    def default_config(self) -> dict[str, Any]:
        """Return the configuration that vLLM uses without a table."""
        return default_config(self.op, self.shape, self.batch)

    def set_config(self, config: Mapping[str, Any]) -> None:
        """Make vLLM use ``config`` for the next calls of the kernel."""
        table: Any = config
        output_size = self.shape.rank if self.op == "shrink" else self.shape.out_features
        input_size = self.shape.in_features if self.op == "shrink" else self.shape.rank
        for key in (output_size, input_size, self.batch, self.shape.slices, MAX_LORAS + 1):
            table = {str(key): table}
        stem = self.card.replace(" ", "_").replace("-", "_")
        suffix = "SHRINK" if self.op == "shrink" else "EXPAND_TRUE"
        (self.folder / f"{stem}_{suffix}.json").write_text(json.dumps(table))
        os.environ[FOLDER_VARIABLE] = str(self.folder)
        clear_vllm_caches()

    def launch(self, layer: Sequence[torch.Tensor]) -> None:
        """Launch the kernel once, on the weights of ``layer``."""
        arguments = self.metadata.meta_args(self.batch, False)
        if self.op == "shrink":
            lora_shrink(self.hidden_tensor, list(layer), self.rank_tensor, *arguments, 1.0)
        else:
            lora_expand(
                self.rank_tensor,
                list(layer),
                self.hidden_tensor,
                *arguments,
                offset_start=0,
                add_inputs=True,
            )

    def run(self, config: Mapping[str, Any]) -> torch.Tensor:
        """Run the kernel with ``config`` on the first layer, and return the output. The output
        buffer then gets its earlier values back.
        """
        self.set_config(config)
        out = self.rank_tensor if self.op == "shrink" else self.hidden_tensor
        original = out.clone()
        self.launch(self.layers[0])
        result = out.clone()
        out.copy_(original)
        return result

    def measure_if_correct(self, config: Mapping[str, Any], expected: torch.Tensor) -> float | None:
        """Return the seconds of one launch with ``config``. Returns None if the kernel does not
        compile, or its output differs from the correct output ``expected``.
        """
        try:
            output = self.run(config)
            if not torch.allclose(output.float(), expected.float(), rtol=0.02, atol=0.02):
                return None
            return self.measure_seconds(config)
        except Exception:  # noqa: BLE001
            # A configuration that fails for any reason is not used. For example, the kernel may
            # need too much shared memory or too many registers, or Triton may reject a block size.
            torch.cuda.synchronize()
            return None

    def measure_seconds(self, config: Mapping[str, Any]) -> float:
        """Return the seconds of one launch with ``config``. A CUDA graph with one launch per layer
        is run ``REPEATS`` times. The result is the median time of a run, divided by the number of
        layers.
        """
        self.set_config(config)
        for layer in self.layers[:2]:
            self.launch(layer)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for layer in self.layers:
                self.launch(layer)
        seconds: list[float] = []
        for _ in range(REPEATS):
            start, end = (_timer() for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3 / len(self.layers))
        return sorted(seconds)[REPEATS // 2]


def _timer() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's own
