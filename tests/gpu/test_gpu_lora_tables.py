"""Tuned LoRA kernels on a GPU: the toolkit tunes a table, and vLLM reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

torch = pytest.importorskip("torch")
vllm = pytest.importorskip("vllm")

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_a_tuned_table_is_used_by_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from toolkit.engine.open_engine import prepare_environment

    prepare_environment()
    from vllm.lora.ops.triton_ops import utils as upstream

    from toolkit.engine import lora_tables, lora_tune

    shapes = [lora_tune.LayerShape((512, 128, 128), 512, 16), lora_tune.LayerShape((512,), 512, 16)]
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
