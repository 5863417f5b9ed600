"""Hostile safetensors headers and config.json files give an error of the toolkit, in bounded time
and memory.
"""

import contextlib
import json
import os
import struct
import time
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toolkit.base.errors import ConfigError, InputError, ToolkitError
from toolkit.base.files import read_json
from toolkit.sizing import read_spec
from toolkit.sizing.headers import read_header, read_stored_weights
from toolkit.sizing.spec import spec_from_values

TENSOR = {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}


def write_safetensors(path, header, data=b"\0" * 8, length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def test_a_good_header(tmp_path):
    path = write_safetensors(
        tmp_path / "a.safetensors", {"w": TENSOR, "__metadata__": {"format": "pt"}}
    )
    (tensor,) = read_header(path).values()
    assert (tensor.dtype, tensor.shape, tensor.nbytes, tensor.elements) == ("BF16", (2, 2), 8, 4)


BAD_HEADERS = {
    "length of 2**60": ({"w": TENSOR}, {"length": 1 << 60}, "states a header of"),
    "length of 2**64 - 1": ({"w": TENSOR}, {"length": (1 << 64) - 1}, "states a header of"),
    "ends inside": ({"w": TENSOR}, {"length": 5000}, "ends inside"),
    "not JSON": (b"{{{{", {}, "JSON"),
    "not UTF-8": (b"\xff\xfe{}", {}, "JSON"),
    "a list": ([], {}, "not a mapping"),
    "nested too deeply": (b"[" * 100_000, {}, "nested too deeply"),
    "a number with 5000 digits": (b'{"w": ' + b"9" * 5000 + b"}", {}, "JSON"),
    "the same name twice": (b'{"w": 1, "w": 2}', {}, "twice"),
    "NaN": (b'{"w": NaN}', {}, "NaN"),
    "an entry that is no mapping": ({"w": 3}, {}, "not a mapping"),
    "an unknown dtype": ({"w": {**TENSOR, "dtype": "F1"}}, {}, "unknown dtype"),
    "a dtype that is a list": ({"w": {**TENSOR, "dtype": ["BF16"]}}, {}, "unknown dtype"),
    "a negative shape": ({"w": {**TENSOR, "shape": [-2, 2]}}, {}, "invalid shape"),
    "a shape that overflows": ({"w": {**TENSOR, "shape": [1 << 59, 1 << 59]}}, {}, "not match"),
    "a boolean in a shape": ({"w": {**TENSOR, "shape": [True, 4]}}, {}, "invalid shape"),
    "offsets turned around": ({"w": {**TENSOR, "data_offsets": [8, 0]}}, {}, "offsets"),
    "offsets of another size": ({"w": {**TENSOR, "data_offsets": [0, 6]}}, {}, "not match"),
    "data beyond the end": (
        {"w": {**TENSOR, "data_offsets": [8, 16]}},
        {},
        "too short for its tensor",
    ),
    "overlapping": (
        {"a": TENSOR, "b": {**TENSOR, "data_offsets": [4, 12]}},
        {"data": b"\0" * 16},
        "overlapping",
    ),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_a_bad_header_is_refused(tmp_path, name):
    header, write_options, expected = BAD_HEADERS[name]
    with pytest.raises(InputError, match=expected) as caught:
        read_header(write_safetensors(tmp_path / "a.safetensors", header, **write_options))
    assert "a.safetensors" in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_long_header_is_not_read_into_memory(tmp_path):
    path = write_safetensors(tmp_path / "a.safetensors", b"x", length=(32 << 20) + 1)
    os.truncate(path, 1 << 33)  # a sparse file, large enough for the header
    tracemalloc.start()
    with pytest.raises(InputError):
        read_header(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("kind", ["pipe", "folder", "missing", "loop", "device"])
def test_a_path_that_is_not_a_regular_file_is_refused(tmp_path, kind):
    path = tmp_path / "config.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(tmp_path / "other")
        (tmp_path / "other").symlink_to(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    start = time.monotonic()
    with pytest.raises(InputError):
        read_json(path)
    assert time.monotonic() - start < 1


def test_a_shard_outside_the_folder_is_refused(tmp_path):
    index = {"weight_map": {"w": "../../etc/passwd"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="outside its folder"):
        read_stored_weights(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        write_safetensors(tmp_path / name, {"w": TENSOR})
    with pytest.raises(InputError, match="another shard"):
        read_stored_weights(tmp_path)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(raw=st.binary(max_size=200), length=st.one_of(st.none(), st.integers(0, 2**64 - 1)))
def test_any_bytes_give_a_header_or_an_input_error(tmp_path, raw, length):
    path = write_safetensors(tmp_path / "a.safetensors", raw, data=b"", length=length)
    with contextlib.suppress(InputError):
        assert isinstance(read_header(path), dict)


VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=8)
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
KEYS = st.sampled_from(
    [*LLAMA, "head_dim", "layer_types", "sliding_window", "quantization_config", "torch_dtype",
     "text_config", "architectures", "num_experts", "mlp_only_layers", "tie_word_embeddings"]
)  # fmt: skip
TYPES = st.sampled_from(
    ["llama", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3", "gemma3_text", "phi3", "gpt_oss",
     "deepseek_v2", "deepseek_v3", "qwen3_next", "mixtral", "mistral", "olmo2", "smollm3"]
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(model_type=TYPES, changes=st.dictionaries(KEYS, VALUES, max_size=4))
def test_any_config_gives_a_spec_or_an_error(model_type, changes):
    values = {**LLAMA, "model_type": model_type, **changes}
    try:
        spec = spec_from_values(values, name="any")
    except (InputError, ConfigError):
        return
    assert spec.parameters > 0
    assert spec.layers >= 1


@settings(max_examples=200, deadline=None)
@given(key=st.sampled_from(sorted(LLAMA)), value=st.integers(min_value=2**24 + 1))
def test_the_error_names_the_key_of_a_size_that_overflows(key, value):
    if key == "model_type":
        return
    with pytest.raises(InputError, match=key):
        spec_from_values({**LLAMA, key: value}, name="any")


def test_a_truncated_config_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA)[:40])
    with pytest.raises(InputError, match="JSON") as refused:
        read_spec(str(tmp_path))
    assert "safetensors" not in str(refused.value)
    (tmp_path / "config.json").write_text('{"vocab_size": 1, "vocab_size": 2}')
    with pytest.raises(InputError, match="the key 'vocab_size' twice"):
        read_spec(str(tmp_path))


def test_an_adapter_that_is_its_own_base_model_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(tmp_path)})
    )
    with pytest.raises(ToolkitError, match="base model"):
        read_spec(str(tmp_path))
