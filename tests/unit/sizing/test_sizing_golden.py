"""The sizes of real models: values of shapes.json, and calculations that a reader can repeat."""

import json

import pytest

from toolkit.config.run_config import SEVEN_PROJECTIONS
from toolkit.sizing import kv_bytes, lora_bytes
from toolkit.sizing.spec import spec_from_values
from toolkit.sizing.weight_bytes import weight_bytes


def test_the_table_is_large_enough(all_shapes):
    assert len(all_shapes) >= 25


def test_each_size_equals_the_table(shape):
    spec = spec_from_values(shape["config"], name=shape["id"])
    dtype = "float16" if spec.dtype == "float16" else "bfloat16"
    assert spec.parameters == shape["parameters"]
    assert weight_bytes(spec, dtype, spec.quantization) == shape["weight_bytes"]
    assert kv_bytes.bytes_per_token(spec, 2) == shape["kv_bytes_per_token"]
    assert kv_bytes.sequence_bytes(spec, 4096, 2, batched_tokens=2048) == shape["kv_4096"]
    assert lora_bytes.engine_lora_elements(spec, 64, 1) * 2 == shape["lora_bytes_64"]
    assert lora_bytes.adapter_parameters(spec, 16, SEVEN_PROJECTIONS) == shape["adapter_16"]


# Sizes of the weight files on the hub, in GB (10**9), as the pages of the models show them.
PUBLISHED_GB = {
    "unsloth/llama-3-8b-Instruct-bnb-4bit": 5.70,
    "TheBloke/Llama-2-7B-AWQ": 3.89,
    "neuralmagic/Meta-Llama-3.1-8B-Instruct-FP8-dynamic": 9.08,
    "openai/gpt-oss-20b": 13.76,
    "meta-llama/Llama-3.1-8B": 16.06,
    "Qwen/Qwen3-30B-A3B": 61.07,
}


@pytest.mark.parametrize("name", PUBLISHED_GB)
def test_weight_bytes_are_those_of_the_published_files(spec_of, name):
    spec = spec_of(name)
    found = weight_bytes(spec, "bfloat16", spec.quantization) / 1e9
    assert found == pytest.approx(PUBLISHED_GB[name], rel=0.005)


@pytest.mark.parametrize(
    ("name", "by_hand"),
    [
        ("meta-llama/Llama-3.1-8B", 2 * 32 * 8 * 128 * 2),
        ("Qwen/Qwen3-0.6B", 2 * 28 * 8 * 128 * 2),  # head_dim is 128, not 1024 / 16
        ("Qwen/Qwen3-32B", 2 * 64 * 8 * 128 * 2),
        ("google/gemma-2-2b-it", 2 * 26 * 4 * 256 * 2),
        ("openai/gpt-oss-20b", 2 * 24 * 8 * 64 * 2),
        ("deepseek-ai/DeepSeek-V3", 61 * (512 + 64) * 2),  # one latent vector and one rotary key
        ("Qwen/Qwen3-Next-80B-A3B-Thinking", 2 * 12 * 2 * 256 * 2),  # 1 layer in 4 has a cache
    ],
)
def test_kv_bytes_per_token_computed_by_hand(spec_of, name, by_hand):
    assert kv_bytes.bytes_per_token(spec_of(name), 2) == by_hand


def test_sliding_windows_limit_the_cache_of_long_sequences(spec_of):
    """In Gemma 3, 52 of 62 layers keep 1024 tokens and one block at any length of the sequence."""
    spec = spec_of("google/gemma-3-27b-it")
    short, long = (kv_bytes.sequence_bytes(spec, length, 2) for length in (16384, 32768))
    full = kv_bytes.bytes_per_token(spec, 2) * 16384
    assert long - short == 10 * 2 * 16 * 128 * 2 * 16384
    assert short < 0.25 * full


def test_expert_slots_are_counted(spec_of):
    """Qwen3-30B-A3B at rank 32 has 48 x 128 experts x 3 matrices x 32 x (2048 + 768) values in
    bf16.
    """
    spec = spec_of("Qwen/Qwen3-30B-A3B")
    experts = 48 * 128 * 3 * 32 * (2048 + 768) * 2
    assert experts / 2**30 == pytest.approx(3.1, abs=0.05)
    assert lora_bytes.engine_lora_elements(spec, 32, 1) * 2 - experts < 0.1 * experts


def test_the_spec_is_equal_after_json(shape):
    again = json.loads(json.dumps(shape["config"]))
    assert (
        spec_from_values(again, name="x").blocks
        == spec_from_values(shape["config"], name="y").blocks
    )
