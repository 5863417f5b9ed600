"""With "auto", from_pretrained chooses the values that the sizer gives a run file with the same
model keys.
"""

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
def model_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a model, on a simulated node with GPUs."""
    node = node_from_json(cases.load("h100x8-healthy").node)
    monkeypatch.setattr(auto_engine, "take_snapshot", lambda: node)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    monkeypatch.setattr("toolkit.policy.load_request.vllm_available", lambda: True)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return folder


def options_for(model_folder: Path, adapter: Any = None, **arguments: Any) -> Any:
    arguments_with_auto = {
        "model_name": str(model_folder),
        "fast_inference": True,
        **AUTO,
        **arguments,
    }
    return engine_options(
        find_checkpoint(str(model_folder)), check_request(arguments_with_auto), adapter
    )


def sized_run_file(model_folder: Path, lora: str, *, world_size: int = 1, **keys: Any) -> Any:
    """The model section with the values that the sizer chooses for a run file on the same GPU."""
    values = {
        "max_seq_length": 2048,
        "enable_sleep_mode": False,
        **keys,
        "model_name": str(model_folder),
    }
    run = {"model": values, "dataset": {"path": "t.jsonl"}, "runtime": {"engine": "vllm"}}
    run["reward"] = {"functions": [{"name": "exact_match", "weight": 1.0}]}
    text = json.dumps(run)[:-1] + f', "lora": {lora}}}'
    (model_folder.parent / "run.json").write_text(text)
    node = auto_engine.take_snapshot()
    gpu = devices.select_device(node, 0)
    assert gpu is not None
    config, device = load_run(model_folder.parent / "run.json"), Device.from_node(node, gpu)
    return resolve(config, device, world_size=world_size)[0].model


def test_auto_gives_the_values_of_a_run_file(model_folder: Path) -> None:
    lora = '{"use_gradient_checkpointing": "unsloth"}'
    sized = sized_run_file(model_folder, lora)
    options = options_for(model_folder)
    assert options.gpu_memory_utilization == sized.gpu_memory_utilization
    assert options.max_lora_rank == sized.max_lora_rank == 16
    assert 0 < options.gpu_memory_utilization < 1

    keys = {"float8_kv_cache": True, "max_num_seqs": 512, "max_lora_rank": 128}
    sized_long = sized_run_file(model_folder, lora, max_seq_length=8192, **keys)
    options = options_for(model_folder, max_seq_length=8192, **keys)
    assert options.gpu_memory_utilization == sized_long.gpu_memory_utilization
    assert options.gpu_memory_utilization != sized.gpu_memory_utilization
    assert options.max_lora_rank == 128


def test_auto_uses_the_given_adapter(model_folder: Path) -> None:
    config = SimpleNamespace(r=24, target_modules={"q_proj"}, rank_pattern={"q_proj": 70})
    options = options_for(model_folder, SimpleNamespace(config=config))
    lora = '{"r": 24, "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 70}, '
    sized = sized_run_file(model_folder, lora + '"use_gradient_checkpointing": "unsloth"}')
    assert options.max_lora_rank == sized.max_lora_rank == 128
    assert options.gpu_memory_utilization == sized.gpu_memory_utilization


def test_a_model_that_does_not_fit_is_an_error(model_folder: Path) -> None:
    (model_folder / "config.json").write_text(json.dumps(LLAMA | {"num_hidden_layers": 4000}))
    with pytest.raises(ConfigError, match="fit"):
        options_for(model_folder)


def test_numbers_are_not_changed(model_folder: Path) -> None:
    options = options_for(model_folder, gpu_memory_utilization=0.37, max_lora_rank=8)
    assert (options.gpu_memory_utilization, options.max_lora_rank) == (0.37, 8)


LARGE = LLAMA | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "head_dim": 128,
    "num_attention_heads": 64, "tie_word_embeddings": False,
}  # fmt: skip


def test_the_estimate_chooses_the_tensor_parallel_size(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model_folder / "config.json").write_text(json.dumps(LARGE))
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setattr(auto_engine, "gather_from_all", lambda own: [own] * 8)
    lora = '{"use_gradient_checkpointing": "unsloth"}'
    sized = sized_run_file(model_folder, lora, world_size=8, tensor_parallel_size="auto")
    options = options_for(model_folder, tensor_parallel_size="auto")
    assert options.tensor_parallel_size == sized.tensor_parallel_size > 1
    assert options.gpu_memory_utilization == sized.gpu_memory_utilization
    with_fixed_share = options_for(
        model_folder, tensor_parallel_size="auto", gpu_memory_utilization=0.9
    )
    assert with_fixed_share.gpu_memory_utilization == 0.9


def test_all_processes_get_the_value_for_the_gpu_with_the_least_free_memory(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    share_of_empty_gpu = options_for(model_folder).gpu_memory_utilization
    monkeypatch.setenv("WORLD_SIZE", "2")
    second_gpu = {"free": 30}

    def gather_two_devices(own: Any) -> list[Any]:
        return [own, dataclasses.replace(own, free_bytes=second_gpu["free"] << 30)]

    monkeypatch.setattr(auto_engine, "gather_from_all", gather_two_devices)
    assert options_for(model_folder).gpu_memory_utilization < share_of_empty_gpu
    second_gpu["free"] = 2
    with pytest.raises(ConfigError, match="fit"):
        options_for(model_folder)


def test_without_a_gpu_the_model_is_not_split(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = dataclasses.replace(auto_engine.take_snapshot(), gpus=())
    monkeypatch.setattr(auto_engine, "take_snapshot", lambda: node)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    options = options_for(model_folder, tensor_parallel_size="auto")
    assert (options.tensor_parallel_size, options.gpu_memory_utilization) == (1, "auto")
