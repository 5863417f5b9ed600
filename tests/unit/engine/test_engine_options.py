"""Engine options: invalid ones are refused without importing torch or vLLM, and the others reach
vLLM as its arguments.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from toolkit.base.errors import ConfigError, ConfigValueError, MissingExtraError, UnsupportedError
from toolkit.engine import open_engine
from toolkit.engine.engine_options import LOAD_FORMAT, EngineOptions


def test_only_options_that_are_set_reach_vllm() -> None:
    options = EngineOptions(
        model="m", revision="r1", gpu_memory_utilization=0.4, lora_target_modules=("q_proj",)
    )
    arguments = options.to_vllm("cuda")
    assert arguments["lora_target_modules"] == ["q_proj"]
    assert arguments["gpu_memory_utilization"] == 0.4
    assert arguments["revision"] == arguments["tokenizer_revision"] == "r1"
    assert arguments["load_format"] == LOAD_FORMAT
    assert arguments["logprobs_mode"] == "processed_logprobs"
    assert "max_num_batched_tokens" not in arguments
    assert arguments["enforce_eager"] is False
    assert options.to_vllm("cpu")["enforce_eager"] is True
    assert "gpu_memory_utilization" not in options.to_vllm("cpu")


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        ({"float8_kv_cache": True}, "kv_cache_dtype", "fp8"),
        ({"enable_sleep_mode": True}, "enable_sleep_mode", True),
        ({"load_in_4bit": True}, "quantization", "bitsandbytes"),
        ({"kv_cache_bytes": 5}, "kv_cache_memory_bytes", 5),
        ({"extra": {"swap_space": 1}}, "swap_space", 1),
    ],
)
def test_each_option_reaches_vllm(changes: dict, key: str, value: object) -> None:
    assert EngineOptions(model="m", **changes).to_vllm("cuda")[key] == value


def test_a_gpu_uses_graphs_without_compilation_by_default() -> None:
    default_config = EngineOptions(model="m").to_vllm("cuda")["compilation_config"]
    assert default_config == {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    assert "compilation_config" not in EngineOptions(model="m").to_vllm("cpu")
    assert "compilation_config" not in EngineOptions(model="m", enforce_eager=True).to_vllm("cuda")
    chosen = EngineOptions(model="m", compilation_config={"mode": 3}).to_vllm("cuda")
    assert chosen["compilation_config"] == {"mode": 3}
    small_batch_config = EngineOptions(model="m", max_num_seqs=20).to_vllm("cuda")[
        "compilation_config"
    ]
    assert small_batch_config["cudagraph_capture_sizes"] == [1, 2, 4, 8, 16, 20]
    # An option of the toolkit, which vLLM does not have.
    assert "dequantized_rollouts" not in EngineOptions(model="m").to_vllm("cuda")


def test_without_lora_and_sharing_their_options_are_omitted() -> None:
    arguments = EngineOptions(model="m", enable_lora=False, share_weights=False).to_vllm("cuda")
    assert not {"enable_lora", "max_lora_rank", "max_loras", "load_format"} & set(arguments)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        (
            {"tensor_parallel_size": 2, "share_weights": False},
            UnsupportedError,
            "part of the weights",
        ),
        ({"trust_remote_code": True}, UnsupportedError, "remote code"),
        ({"extra": {"load_format": "dummy"}}, ConfigValueError, "load_format"),
        ({"extra": {"max_loras": 2}}, ConfigValueError, "is a field of EngineOptions"),
    ],
)
def test_unsupported_options_are_refused_at_once(changes: dict, error: type, text: str) -> None:
    with pytest.raises(error, match=text) as caught:
        EngineOptions(model="m", **changes)
    assert caught.value.fix
    EngineOptions(model="m", tensor_parallel_size=2)


def test_environment_keeps_values_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_NO_USAGE_STATS"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)  # monkeypatch restores the original value after the test
    open_engine.prepare_environment()
    import os

    assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(ConfigError, match="another process") as caught:
        open_engine.prepare_environment()
    assert caught.value.fix == "unset VLLM_ENABLE_V1_MULTIPROCESSING"


def test_without_vllm_the_error_names_the_pip_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_engine, "vllm_available", lambda: False)
    with pytest.raises(MissingExtraError, match="vLLM") as caught:
        open_engine.open_engine(EngineOptions(model="m"))
    assert "grpo-toolkit[cuda]" in str(caught.value.fix)


def test_options_rollout_and_load_import_neither_torch_nor_vllm() -> None:
    code = (
        "import sys, toolkit.engine.rollout_engine, toolkit.engine.engine_options,"
        " toolkit.engine.rollout_request,"
        " toolkit.engine.open_engine;"
        " print(sorted({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
