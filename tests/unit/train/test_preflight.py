"""preflight.json holds to report.schema.json, and a run is sized for its own device."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.config import load_run
from toolkit.config.validate import check_instance
from toolkit.gpu.snapshot_json import node_from_json
from toolkit.train import preflight

sys.path.insert(0, str(Path(__file__).parents[2] / "fakes"))

import cases

if TYPE_CHECKING:
    import pytest

    from toolkit.gpu.snapshot import NodeSnapshot

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def prepared(folder: Path, node: NodeSnapshot, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """preflight.json of a small run on a given node."""
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(LLAMA))
    (folder / "train.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n')
    run = {
        "model": {"model_name": str(model)},
        "dataset": {
            "path": str(folder / "train.jsonl"),
            "prompt": "question",
            "answer": "answer",
        },
        "reward": {"functions": [{"name": "numeric_match"}]},
        "runtime": {"output_dir": str(folder / "out")},
    }
    (folder / "run.json").write_text(json.dumps(run))
    monkeypatch.setattr(preflight, "take", lambda **_: node)
    ready = preflight.preflight(load_run(folder / "run.json"), judge=False)
    written = ready.write(folder)
    report: dict[str, Any] = json.loads(written.read_text())
    return report


def test_preflight_json_holds_to_the_schema(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = node_from_json(cases.load("h100x8-healthy").node)
    report = prepared(tmp_path, node, monkeypatch)
    assert check_instance(report, "report") == []
    assert report["device"] == "NVIDIA H100 80GB HBM3"
    assert report["sizing"]["choice"]["max_lora_rank"] >= 16


def test_a_run_on_a_slice_is_sized_for_the_slice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = node_from_json(cases.load("h200-mig").node)
    assert "MIG 1g.18gb" in str(prepared(tmp_path, node, monkeypatch)["device"])


def test_hidden_gpus_make_a_cpu_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases.load("h100x8-hidden")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert prepared(tmp_path, node_from_json(case.node), monkeypatch)["device"] is None
