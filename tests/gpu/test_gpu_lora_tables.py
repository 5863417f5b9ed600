"""LoRA kernels on a GPU: vLLM reads the table that the toolkit tuned, and a start compiles the
kernels in other threads.
"""

from __future__ import annotations

import sys
import threading
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


def test_no_lora_kernel_is_compiled_at_its_first_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start and the rollouts launch only variants that the thread of ``lora_compile`` has
    compiled. The launchers (C functions) are also compiled before.
    """
    import engine_checkpoints

    from toolkit.engine.engine_options import EngineOptions
    from toolkit.engine.open_engine import open_engine
    from toolkit.engine.rollout_request import Sampling

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    from triton import knobs

    compiled: list[tuple[str, str]] = []  # the kernel and the thread

    def record(*_: Any, **facts: Any) -> None:
        compiled.append((facts["fn"].name, threading.current_thread().name))

    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", record)
    from triton.runtime import build

    c_compilations: list[set[str]] = []  # the functions on the stack
    run_c_compiler = build._build

    def record_c_compilation(*arguments: Any) -> str:
        c_compilations.append({frame.name for frame in traceback.extract_stack()})
        return run_c_compiler(*arguments)

    monkeypatch.setattr(build, "_build", record_c_compilation)
    folder = engine_checkpoints.make_checkpoint(
        tmp_path / "model", "llama", hidden_size=512, intermediate_size=1024, head_dim=64
    )
    options = EngineOptions(
        model=str(folder),
        max_model_len=256,
        dtype="bfloat16",
        gpu_memory_utilization=0.2,
        max_num_seqs=16,
    )
    with open_engine(options) as engine:
        for length in (5, 16, 37, 200):
            engine.generate([list(range(3, 3 + length))], Sampling(n=3, max_tokens=4), seed=1)
    threads = {thread for name, thread in compiled if "_lora_shrink_kernel" in name}
    threads |= {thread for name, thread in compiled if "_lora_expand_kernel" in name}
    assert threads == {"lora-compile"}
    assert any("_build_launcher" in names for names in c_compilations)
    assert not any(names & {"_lora_shrink", "_lora_expand"} for names in c_compilations)
