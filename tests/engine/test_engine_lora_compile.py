"""While the engine reads weights, the LoRA kernels are compiled for the slots that the engine then
has. No variant is left for the first launch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import engine_checkpoints
import pytest

from toolkit.engine import kernel_process, lora_compile, lora_kernels
from toolkit.engine.lora_tables import LayerShape
from toolkit.engine.vllm_internals import open_internals
from toolkit.sizing import fused_shapes, read_spec

if TYPE_CHECKING:
    from collections.abc import Callable

    from toolkit.engine.engine import Engine

pytestmark = pytest.mark.engine

WORKER = Path(__file__).with_name("lora_compile_worker.py")


def slot_shapes(engine: Engine) -> set[LayerShape]:
    """The shapes of the engine's LoRA slots: A is (slots, 1, rank, columns), B is (slots, 1, rows,
    rank).
    """
    shapes = set()
    for layer in open_internals(engine.llm).lora_manager.modules.values():
        if hasattr(layer, "lora_a_stacked"):
            rank, columns = layer.lora_a_stacked[0].shape[2:]
            rows = tuple(b.shape[2] for b in layer.lora_b_stacked)
            shapes.add(LayerShape(rows, columns, rank))
    return shapes


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        pytest.param("phi3", marks=pytest.mark.thorough),
        pytest.param("gemma3", marks=pytest.mark.thorough),
        pytest.param("qwen3_moe", marks=pytest.mark.thorough),
    ],
)
def test_kernels_are_compiled_for_the_slots(
    family: str, tmp_path: Path, open_small: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[lora_kernels.LoraSlots] = []
    monkeypatch.setattr(lora_compile, "device_type", lambda: "cuda")
    monkeypatch.setattr(lora_compile, "compile_lora_kernels", calls.append)
    with open_small(engine_checkpoints.make_checkpoint(tmp_path, family)) as engine:
        (slots,) = calls
        assert slots.shapes == slot_shapes(engine)
        layers = open_internals(engine.llm).lora_manager.modules.values()
        a = next(layer.lora_a_stacked[0] for layer in layers if hasattr(layer, "lora_a_stacked"))
        assert (slots.max_loras, slots.dtype) == (a.shape[0], a.dtype)
        assert max(slots.batch_sizes) == 512
        # The second process knows only the checkpoint and the options.
        shapes = fused_shapes(read_spec(engine.options.model))
        job = kernel_process.KernelJob.from_options(engine.options, shapes)
        expected = lora_kernels.slots_of_job(job)
        assert expected.shapes == slots.shapes
        assert expected.max_loras == slots.max_loras
        assert set(slots.batch_sizes) <= set(expected.batch_sizes)


def run_worker(cache: Path) -> dict[str, Any]:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(
        [sys.executable, str(WORKER)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.thorough
def test_no_variant_is_left_for_the_first_launch(tmp_path: Path) -> None:
    result = run_worker(tmp_path)
    counts = Counter(name.rpartition(".")[2] for name in result["ahead"])
    assert counts["_lora_shrink_kernel"] >= 2
    assert counts["_lora_expand_kernel"] >= 2
    assert result["later"] == []
    # Each launcher (a C function) is built once.
    assert result["launchers_missing"] == 0
    assert 2 <= result["launchers"] < len(result["ahead"])
    # The recorder sees a variant that was not compiled ahead.
    assert result["another_shape"]


def test_batch_sizes_have_both_divisibilities_and_end_at_the_largest_batch() -> None:
    sizes = lora_kernels.sizes_with_all_variants((1, 2, 48), 300)
    assert {1, 2, 48, 128, 129, 300} <= set(sizes)
    assert max(sizes) == 300
    assert list(sizes) == sorted(set(sizes))


def test_nothing_is_compiled_without_lora_or_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("must not be called")

    monkeypatch.setattr(lora_compile, "compile_lora_kernels", refuse)
    with_lora: Any = SimpleNamespace(lora_config=SimpleNamespace())
    without_lora: Any = SimpleNamespace(lora_config=None)
    model: Any = None
    for device, config in (("cpu", with_lora), ("cuda", without_lora)):
        monkeypatch.setattr(lora_compile, "device_type", lambda device=device: device)
        with lora_compile.compiled_lora_kernels(model, config):
            pass


def test_an_error_while_compiling_does_not_end_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def fail(slots: object) -> None:
        calls.append(slots)
        raise RuntimeError("ptxas is missing")

    monkeypatch.setattr(kernel_process, "wait_for_lora_kernels", lambda: calls.append("waited"))

    monkeypatch.setattr(lora_compile, "device_type", lambda: "cuda")
    monkeypatch.setattr(lora_compile, "lora_slots", lambda *_: "slots")
    monkeypatch.setattr(lora_compile, "compile_lora_kernels", fail)
    model: Any = None
    config: Any = SimpleNamespace(lora_config=SimpleNamespace())
    with lora_compile.compiled_lora_kernels(model, config):
        pass
    # The second process is asked first.
    assert calls == ["waited", "slots"]
