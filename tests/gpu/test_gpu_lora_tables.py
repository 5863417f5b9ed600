"""LoRA kernels on a GPU: vLLM reads the table that the toolkit tuned. A start compiles the kernels
in other threads, or finds the kernels that a second process has compiled.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
vllm = pytest.importorskip("vllm")

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_a_tuned_table_is_used_by_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from toolkit.engine.open_engine import prepare_environment

    prepare_environment()
    from vllm.lora.ops.triton_ops import utils as upstream

    from toolkit.engine import lora_tables, lora_tune

    shapes = [
        lora_tables.LayerShape((512, 128, 128), 512, 16),
        lora_tables.LayerShape((512,), 512, 16),
    ]
    monkeypatch.setattr(lora_tune, "TUNED_BATCH_SIZES", (8,))
    messages: list[str] = []
    table, before, after = lora_tune.tune_card(shapes, 60, messages.append)
    assert len(messages) == 4
    assert 0 < after <= before
    path = tmp_path / "table.json"
    lora_tables.write_table(table, path)
    monkeypatch.setenv(lora_tables.TABLE_VARIABLE, str(path))
    card = torch.cuda.get_device_name()
    assert lora_tables.use_table(card, vllm.__version__) is not None
    lora_tune.clear_vllm_caches()
    for op, key in (("shrink", "SHRINK"), ("expand", "EXPAND_TRUE")):
        config = upstream.get_lora_op_configs(
            op, 2, 8, 512, 16, 3, add_inputs=None if op == "shrink" else True
        )
        k, n = ("512", "16") if op == "shrink" else ("16", "512")
        assert config == table[key]["2"]["3"]["8"][k][n]
    # A number of slices that was not tuned has an entry too: vLLM would fail without one.
    assert upstream.get_lora_op_configs("shrink", 2, 8, 512, 16, 2) is not None


def small_options(folder: Path) -> Any:
    """The options of an engine with a small random model, which is written to ``folder``."""
    import engine_checkpoints

    from toolkit.engine.engine_options import EngineOptions

    checkpoint = engine_checkpoints.make_checkpoint(
        folder, "llama", hidden_size=512, intermediate_size=1024, head_dim=64
    )
    return EngineOptions(
        model=str(checkpoint),
        max_model_len=256,
        dtype="bfloat16",
        gpu_memory_utilization=0.2,
        max_num_seqs=16,
    )


def record_c_compilations(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """Return a list that grows when this process runs a C compiler for Triton. Each item has the
    names of the functions on the stack.
    """
    from triton.runtime import build

    compilations: list[set[str]] = []
    run_c_compiler = build._build

    def record(*arguments: Any) -> str:
        compilations.append({frame.name for frame in traceback.extract_stack()})
        return run_c_compiler(*arguments)

    monkeypatch.setattr(build, "_build", record)
    return compilations


def start_and_generate(options: Any) -> None:
    from toolkit.engine.open_engine import open_engine
    from toolkit.engine.rollout_request import Sampling

    with open_engine(options) as engine:
        for length in (5, 16, 37, 200):
            engine.generate([list(range(3, 3 + length))], Sampling(n=3, max_tokens=4), seed=1)


def test_no_lora_kernel_is_compiled_at_its_first_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the second process, the start and the rollouts launch only variants that the thread
    of ``lora_compile`` has compiled. The launchers (C functions) are also compiled before.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    from triton import knobs

    compiled: list[tuple[str, str]] = []  # the kernel and the thread

    def record(*_: Any, **facts: Any) -> None:
        compiled.append((facts["fn"].name, threading.current_thread().name))

    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", record)
    c_compilations = record_c_compilations(monkeypatch)
    start_and_generate(small_options(tmp_path / "model"))
    threads = {thread for name, thread in compiled if "_lora_shrink_kernel" in name}
    threads |= {thread for name, thread in compiled if "_lora_expand_kernel" in name}
    assert threads == {"lora-compile"}
    assert any("_build_launcher" in names for names in c_compilations)
    assert not any(names & {"_lora_shrink", "_lora_expand"} for names in c_compilations)


def test_a_start_finds_the_kernels_of_the_second_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start with an empty cache compiles about 40 LoRA kernels, and runs a C compiler about 25
    times. Here the second process has done it before. It has not used the GPU.
    """
    from toolkit.engine import kernel_process
    from toolkit.engine.open_engine import prepare_environment
    from toolkit.sizing import fused_shapes, read_spec

    prepare_environment()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    options = small_options(tmp_path / "model")
    free_before, _ = torch.cuda.mem_get_info()
    least_free = free_before
    kernel_process.start()
    kernel_process.send_job(options, lambda: fused_shapes(read_spec(options.model)))
    assert kernel_process._child is not None
    process = kernel_process._child.process
    while process.poll() is None:
        least_free = min(least_free, torch.cuda.mem_get_info()[0])
        time.sleep(0.05)
    assert process.returncode == 0
    assert free_before - least_free < 64 << 20
    from triton import knobs

    lora_kernels: list[tuple[str, bool]] = []  # the name, and whether it was in the cache

    def record(*_: Any, src: Any, cache_hit: bool, **__: Any) -> None:
        if "_lora_" in src.name:
            lora_kernels.append((src.name, cache_hit))

    monkeypatch.setattr(knobs.compilation, "listener", record)
    c_compilations = record_c_compilations(monkeypatch)
    start_and_generate(options)
    assert len(c_compilations) <= 2, c_compilations
    assert lora_kernels
    assert all(cache_hit for _, cache_hit in lora_kernels)
