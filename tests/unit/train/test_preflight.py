"""preflight.json holds to report.schema.json, and a run is sized for its own device."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from toolkit.base.errors import ConfigError
from toolkit.cli import request
from toolkit.cli.train_run import train
from toolkit.config import load_run
from toolkit.config.resolved import Situation, resolve_run
from toolkit.config.validate import check_instance
from toolkit.gpu.checks import CheckContext, run_checks
from toolkit.gpu.snapshot_json import node_from_json
from toolkit.sizing.device import local_situation
from toolkit.train import preflight

sys.path.insert(0, str(Path(__file__).parents[2] / "fakes"))

import cases

if TYPE_CHECKING:
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


def prepared_run(folder: Path) -> Path:
    """A small run."""
    model = folder / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(LLAMA))
    (folder / "train.jsonl").write_text(2 * ('{"question": "1+1?", "answer": "2"}\n'))
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
    return folder / "run.json"


def prepared(folder: Path, node: NodeSnapshot, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """preflight.json of a small run on a given node."""
    run_file = prepared_run(folder)
    monkeypatch.setattr(preflight, "take_snapshot", lambda **_: node)
    ready = preflight.preflight(load_run(run_file), raise_on_failure=False)
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


class Told:
    """Peers of which the others have told their devices already."""

    def __init__(self, *others: dict[str, Any] | None) -> None:
        self.others, self.size, self.rank = others, 1 + len(others), 0

    def exchange(self, name: str, value: Any) -> list[Any]:
        assert name == "device"
        return json.loads(json.dumps([value, *self.others]))


def card(total_gib: int, free_gib: float, name: str = "NVIDIA H100 80GB HBM3") -> dict[str, Any]:
    return {
        "name": name,
        "total_bytes": total_gib << 30,
        "free_bytes": int(free_gib * (1 << 30)),
        "context_bytes": 682 << 20,
        "compute_capability": [9, 0],
        "reserved_bytes": None,
        "here": True,
    }


def ranked(
    folder: Path, monkeypatch: pytest.MonkeyPatch, peers: Told | None, name: str = "h100x8-healthy"
) -> preflight.Preflight:
    prepared(folder, node_from_json(cases.load(name).node), monkeypatch)
    config = load_run(folder / "run.json", world_size=2)
    return preflight.preflight(config, world_size=2, raise_on_failure=False, peers=peers)


def test_each_rank_looks_at_its_own_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = node_from_json(cases.load("h100x8-healthy").node)
    for name, value in {"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    run = resolve_run(load_run(prepared_run(tmp_path)), local_situation(node))
    asked = preflight.check_context(run, node)
    assert asked.gpu_index == 3
    assert asked.world_size == 4  # this node's, not the whole run's
    assert asked.gpu_count == 4
    monkeypatch.setenv("LOCAL_RANK", "8")
    assert preflight.check_context(run, node).gpu_index is None
    asked = replace(preflight.check_context(run, node), world_size=9)
    failed = [check.evidence for check in run_checks(node, asked) if check.verdict == "fail"]
    assert any("9" in evidence and "8" in evidence for evidence in failed), failed


def test_a_run_asks_what_envcheck_check_asks_for_it(tmp_path: Path) -> None:
    config = load_run(prepared_run(tmp_path), ("model.fast_inference=true",))
    asked = preflight.check_context(resolve_run(config, Situation()))
    assert asked == CheckContext(**request.run_requirements(config, Situation()))
    assert asked.engine == "vllm"


def test_all_are_sized_for_the_smallest_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = ranked(tmp_path / "a", monkeypatch, None)
    tight = ranked(tmp_path / "b", monkeypatch, Told(card(80, 40)))
    assert tight.device is not None
    assert alone.device is not None
    assert tight.device.free_bytes == 40 << 30 < alone.device.free_bytes
    assert tight.device.compute_capability == (9, 0)
    mine, theirs = tight.config.model, alone.config.model
    assert mine.gpu_memory_utilization < theirs.gpu_memory_utilization
    # From the other side: the process on the card with a tenant comes to the same values.
    monkeypatch.setattr(preflight.Device, "from_node", lambda *_: tight.device)
    other = ranked(tmp_path / "c", monkeypatch, Told(dataclasses.asdict(alone.device)))
    assert dataclasses.replace(other.config.model, model_name="") == dataclasses.replace(
        mine, model_name=""
    )


def test_a_larger_card_with_less_room_than_its_share_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The share of the smallest card is more than the larger one has free."""
    with pytest.raises(ConfigError):
        ranked(tmp_path, monkeypatch, Told(card(400, 80, "NVIDIA B300")))


def test_gpu_and_cpu_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="1 of 2 processes have a GPU; process 1 has none"):
        ranked(tmp_path, monkeypatch, Told(None))


def test_a_run_that_cannot_be_here_is_refused_by_its_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``toolkit train`` judges the run file again, for the device that it finds."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(preflight, "run_checks", lambda *_: ())  # of a node and a model that do
    run_file = prepared_run(tmp_path)
    sets = ("--set", "model.attn_implementation=flash_attention_2")
    with pytest.raises(ConfigError, match=r"error\[LOAD023\].*needs a GPU"):
        train.main([str(run_file), *sets], standalone_mode=False)
    assert not (tmp_path / "out" / "preflight.json").exists()
