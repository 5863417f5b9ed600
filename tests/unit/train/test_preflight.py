"""preflight.json matches report.schema.json, and a run is sized for its own device."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from toolkit.base.errors import ConfigError
from toolkit.cli import check_request
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


def write_run(folder: Path) -> Path:
    """Write the model, the data and the run file of a small run. Return the run file."""
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


def preflight_json(
    folder: Path, node: NodeSnapshot, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """Return the content of preflight.json for a small run on ``node``."""
    run_file = write_run(folder)
    monkeypatch.setattr(preflight, "take_snapshot", lambda **_: node)
    checked = preflight.preflight(load_run(run_file), raise_on_failure=False)
    written = checked.write(folder)
    report: dict[str, Any] = json.loads(written.read_text())
    return report


def test_preflight_json_matches_the_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = node_from_json(cases.load("h100x8-healthy").node)
    report = preflight_json(tmp_path, node, monkeypatch)
    assert check_instance(report, "report") == []
    assert report["device"] == "NVIDIA H100 80GB HBM3"
    assert report["sizing"]["choice"]["max_lora_rank"] >= 16


def test_a_run_on_a_mig_slice_is_sized_for_the_slice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = node_from_json(cases.load("h200-mig").node)
    assert "MIG 1g.18gb" in str(preflight_json(tmp_path, node, monkeypatch)["device"])


def test_hidden_gpus_make_a_cpu_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases.load("h100x8-hidden")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert preflight_json(tmp_path, node_from_json(case.node), monkeypatch)["device"] is None


class FakePeers:
    """The peers of a process. The other processes have already sent their devices."""

    def __init__(self, *others: dict[str, Any] | None) -> None:
        self.others, self.size, self.rank = others, 1 + len(others), 0

    def exchange(self, name: str, value: Any) -> list[Any]:
        assert name == "device"
        return json.loads(json.dumps([value, *self.others]))


def gpu_fields(
    total_gib: int, free_gib: float, name: str = "NVIDIA H100 80GB HBM3"
) -> dict[str, Any]:
    return {
        "name": name,
        "total_bytes": total_gib << 30,
        "free_bytes": int(free_gib * (1 << 30)),
        "context_bytes": 682 << 20,
        "compute_capability": [9, 0],
        "reserved_bytes": None,
        "is_local": True,
    }


def run_preflight(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    peers: FakePeers | None,
    name: str = "h100x8-healthy",
) -> preflight.Preflight:
    preflight_json(folder, node_from_json(cases.load(name).node), monkeypatch)
    config = load_run(folder / "run.json", world_size=2)
    return preflight.preflight(config, world_size=2, raise_on_failure=False, peers=peers)


def test_each_rank_checks_its_own_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = node_from_json(cases.load("h100x8-healthy").node)
    for name, value in {"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    run = resolve_run(load_run(write_run(tmp_path)), local_situation(node))
    context = preflight.check_context(run, node)
    assert context.gpu_index == 3
    assert context.world_size == 4  # of this node, not of the whole run
    assert context.gpu_count == 4
    monkeypatch.setenv("LOCAL_RANK", "8")
    assert preflight.check_context(run, node).gpu_index is None
    context = replace(preflight.check_context(run, node), world_size=9)
    failed = [check.evidence for check in run_checks(node, context) if check.verdict == "fail"]
    assert any("9" in evidence and "8" in evidence for evidence in failed), failed


def test_preflight_and_envcheck_check_use_the_same_requirements(tmp_path: Path) -> None:
    config = load_run(write_run(tmp_path), ("model.fast_inference=true",))
    context = preflight.check_context(resolve_run(config, Situation()))
    assert context == CheckContext(**check_request.run_requirements(config, Situation()))
    assert context.engine == "vllm"


def test_all_ranks_are_sized_for_the_smallest_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = run_preflight(tmp_path / "a", monkeypatch, None)
    tight = run_preflight(tmp_path / "b", monkeypatch, FakePeers(gpu_fields(80, 40)))
    assert tight.device is not None
    assert alone.device is not None
    assert tight.device.free_bytes == 40 << 30 < alone.device.free_bytes
    assert tight.device.compute_capability == (9, 0)
    tight_model, alone_model = tight.config.model, alone.config.model
    assert tight_model.gpu_memory_utilization < alone_model.gpu_memory_utilization
    # The process on the GPU with less free memory chooses the same values.
    monkeypatch.setattr(preflight.Device, "from_node", lambda *_: tight.device)
    other = run_preflight(tmp_path / "c", monkeypatch, FakePeers(dataclasses.asdict(alone.device)))
    assert dataclasses.replace(other.config.model, model_name="") == dataclasses.replace(
        tight_model, model_name=""
    )


def test_a_larger_gpu_with_too_little_free_memory_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory share for the smallest GPU is more than the free memory of the larger GPU."""
    with pytest.raises(ConfigError):
        run_preflight(tmp_path, monkeypatch, FakePeers(gpu_fields(400, 80, "NVIDIA B300")))


def test_ranks_with_and_without_a_gpu_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="1 of 2 processes have a GPU; process 1 has none"):
        run_preflight(tmp_path, monkeypatch, FakePeers(None))


def test_a_rule_rejects_a_run_that_does_not_fit_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``toolkit train`` applies the rules to the run file again, for the device of this machine."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(preflight, "run_checks", lambda *_: ())  # no check fails
    run_file = write_run(tmp_path)
    sets = ("--set", "model.attn_implementation=flash_attention_2")
    with pytest.raises(ConfigError, match=r"error\[LOAD023\].*needs a GPU"):
        train.main([str(run_file), *sets], standalone_mode=False)
    assert not (tmp_path / "out" / "preflight.json").exists()
