""" "auto" in from_pretrained is what the sizer gives a run file with the same model keys."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from toolkit.base.errors import ConfigError
from toolkit.config import load_run
from toolkit.gpu import devices
from toolkit.gpu.snapshot_json import node_from_json
from toolkit.policy import auto_engine
from toolkit.policy.engine_model import engine_options
from toolkit.policy.load_request import check_request
from toolkit.policy.model_files import find_checkpoint
from toolkit.sizing import Device, resolve

sys.path.insert(0, str(Path(__file__).parents[2] / "fakes"))

import cases

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048,
    "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
    "max_position_embeddings": 131072, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip
AUTO = {"gpu_memory_utilization": "auto", "max_lora_rank": "auto"}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's folder, on a node with a GPU."""
    node = node_from_json(cases.load("h100x8-healthy").node)
    monkeypatch.setattr(auto_engine, "take_snapshot", lambda: node)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    monkeypatch.setattr("toolkit.policy.load_request.vllm_available", lambda: True)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return folder


def opened(model: Path, adapter: Any = None, **arguments: Any) -> Any:
    given = {"model_name": str(model), "fast_inference": True, **AUTO, **arguments}
    return engine_options(find_checkpoint(str(model)), check_request(given), adapter)


def of_a_run_file(model: Path, lora: str, *, world_size: int = 1, **keys: Any) -> Any:
    """The sizer's choice for a run file on the same GPU."""
    values = {"max_seq_length": 2048, "enable_sleep_mode": False, **keys, "model_name": str(model)}
    run = {"model": values, "dataset": {"path": "t.jsonl"}, "runtime": {"engine": "vllm"}}
    run["reward"] = {"functions": [{"name": "exact_match", "weight": 1.0}]}
    text = json.dumps(run)[:-1] + f', "lora": {lora}}}'
    (model.parent / "run.json").write_text(text)
    node = auto_engine.take_snapshot()
    gpu = devices.select_device(node, 0)
    assert gpu is not None
    config, device = load_run(model.parent / "run.json"), Device.from_node(node, gpu)
    return resolve(config, device, world_size=world_size)[0].model


def test_auto_is_what_a_run_file_gets(model: Path) -> None:
    lora = '{"use_gradient_checkpointing": "unsloth"}'
    sized = of_a_run_file(model, lora)
    options = opened(model)
    assert options.gpu_memory_utilization == sized.gpu_memory_utilization
    assert options.max_lora_rank == sized.max_lora_rank == 16
    assert 0 < options.gpu_memory_utilization < 1

    keys = {"float8_kv_cache": True, "max_num_seqs": 512, "max_lora_rank": 128}
    other = of_a_run_file(model, lora, max_seq_length=8192, **keys)
    options = opened(model, max_seq_length=8192, **keys)
    assert options.gpu_memory_utilization == other.gpu_memory_utilization
    assert options.gpu_memory_utilization != sized.gpu_memory_utilization
    assert options.max_lora_rank == 128


def test_auto_follows_the_adapter_at_hand(model: Path) -> None:
    config = SimpleNamespace(r=24, target_modules={"q_proj"}, rank_pattern={"q_proj": 70})
    options = opened(model, SimpleNamespace(config=config))
    lora = '{"r": 24, "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 70}, '
    sized = of_a_run_file(model, lora + '"use_gradient_checkpointing": "unsloth"}')
    assert options.max_lora_rank == sized.max_lora_rank == 128
    assert options.gpu_memory_utilization == sized.gpu_memory_utilization


def test_what_does_not_fit_is_told_with_what_would_make_it_fit(model: Path) -> None:
    (model / "config.json").write_text(json.dumps(LLAMA | {"num_hidden_layers": 4000}))
    with pytest.raises(ConfigError, match="fit"):
        opened(model)


def test_a_number_is_taken_as_it_is(model: Path) -> None:
    options = opened(model, gpu_memory_utilization=0.37, max_lora_rank=8)
    assert (options.gpu_memory_utilization, options.max_lora_rank) == (0.37, 8)


LARGE = LLAMA | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "head_dim": 128,
    "num_attention_heads": 64, "tie_word_embeddings": False,
}  # fmt: skip


def test_the_sizer_chooses_over_how_many_cards_a_model_is_split(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model / "config.json").write_text(json.dumps(LARGE))
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setattr(auto_engine, "gather_from_all", lambda own: [own] * 8)
    lora = '{"use_gradient_checkpointing": "unsloth"}'
    sized = of_a_run_file(model, lora, world_size=8, tensor_parallel_size="auto")
    options = opened(model, tensor_parallel_size="auto")
    assert options.tensor_parallel_size == sized.tensor_parallel_size > 1
    assert options.gpu_memory_utilization == sized.gpu_memory_utilization
    written = opened(model, tensor_parallel_size="auto", gpu_memory_utilization=0.9)
    assert written.gpu_memory_utilization == 0.9


def test_all_processes_are_sized_for_the_fullest_card(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = opened(model).gpu_memory_utilization
    monkeypatch.setenv("WORLD_SIZE", "2")
    fuller = {"free": 30}

    def exchange(own: Any) -> list[Any]:
        return [own, dataclasses.replace(own, free_bytes=fuller["free"] << 30)]

    monkeypatch.setattr(auto_engine, "gather_from_all", exchange)
    assert opened(model).gpu_memory_utilization < empty
    fuller["free"] = 2
    with pytest.raises(ConfigError, match="fit"):
        opened(model)


def test_one_process_without_a_gpu_holds_the_model(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = dataclasses.replace(auto_engine.take_snapshot(), gpus=())
    monkeypatch.setattr(auto_engine, "take_snapshot", lambda: node)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    options = opened(model, tensor_parallel_size="auto")
    assert (options.tensor_parallel_size, options.gpu_memory_utilization) == (1, "auto")
