"""Where the sizer finds a model, and architectures that it does not know."""

import json
import struct
import sys

import pytest

from toolkit.base.errors import InputError, UnsupportedError
from toolkit.sizing import read_spec
from toolkit.sizing.families import FAMILIES
from toolkit.sizing.spec import UNKNOWN_MARGIN, spec_from_values

ID = "meta-llama/Llama-3.2-1B-Instruct"
COMMIT = "a" * 40


def write_safetensors(path, shapes, dtype="BF16", width=2):
    header, offset = {}, 0
    for name, shape in shapes.items():
        count = width
        for size in shape:
            count *= size
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + count]}
        offset += count
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + offset)


@pytest.fixture
def cache(tmp_path, monkeypatch, all_shapes):
    """The folder of a model in a hub cache with the layout of huggingface_hub."""
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    folder = tmp_path / "hub" / ("models--" + ID.replace("/", "--"))
    blob = folder / "blobs" / "b"
    snapshot = folder / "snapshots" / COMMIT
    for each in (blob.parent, snapshot, folder / "refs"):
        each.mkdir(parents=True)
    blob.write_text(json.dumps(all_shapes[ID]["config"]))
    (snapshot / "config.json").symlink_to(blob)
    (folder / "refs" / "main").write_text(COMMIT)
    return folder


def test_a_cached_hub_id(cache):
    assert read_spec(ID).parameters == 1235814400
    assert read_spec(ID, revision=COMMIT).parameters == 1235814400


def test_the_hub_cache_variable_takes_precedence(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HOME", "/nowhere")
    assert read_spec(ID).layers == 16


@pytest.mark.parametrize("revision", ["v2", "../../refs/main", "b" * 40])
def test_a_revision_that_is_not_cached_is_refused(cache, revision):
    with pytest.raises(InputError, match="nor in the cache"):
        read_spec(ID, revision=revision)


@pytest.mark.parametrize("name", ["", "no/such/thing/here", "a\0b", "/nowhere/at/all"])
def test_an_invalid_model_name_is_refused(name):
    with pytest.raises(InputError) as caught:
        read_spec(name)
    assert caught.value.fix


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"config\.json does not exist"):
        read_spec(str(tmp_path))


def test_an_adapter_is_sized_by_its_base(cache, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": ID}))
    assert read_spec(str(adapter)).parameters == 1235814400


UNKNOWN = {
    "model_type": "novel",
    "architectures": ["NovelForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "torch_dtype": "bfloat16",
}
LAYER = {
    "self_attn.q_proj.weight": [64, 64],
    "self_attn.k_proj.weight": [32, 64],
    "self_attn.v_proj.weight": [32, 64],
    "self_attn.o_proj.weight": [64, 64],
    "mlp.up_proj.weight": [256, 64],
    "mlp.down_proj.weight": [64, 256],
    "norm.weight": [64],
}


def write_unknown_model(folder, **changes):
    (folder / "config.json").write_text(json.dumps({**UNKNOWN, **changes}))
    shapes = {f"model.layers.{n}.{name}": shape for n in range(2) for name, shape in LAYER.items()}
    shapes |= {"model.embed_tokens.weight": [100, 64], "model.norm.weight": [64]}
    write_safetensors(folder / "model.safetensors", shapes)
    return sum(rows * (columns[0] if columns else 1) for rows, *columns in shapes.values())


def test_an_unknown_architecture_is_sized_from_its_headers(tmp_path):
    count = write_unknown_model(tmp_path)
    spec = read_spec(str(tmp_path))
    assert spec.parameters == count
    assert spec.margin == UNKNOWN_MARGIN
    assert spec.tied  # the headers have no separate LM head
    assert spec.layers == 2
    assert any("unknown architecture" in note for note in spec.notes)
    # For some models transformers 5 writes 0 if there is no window.
    write_unknown_model(tmp_path, sliding_window=0)
    assert read_spec(str(tmp_path)).blocks[0].cache.window is None


def test_an_unknown_architecture_that_lacks_keys(tmp_path):
    write_unknown_model(tmp_path, hidden_size=None)
    with pytest.raises(UnsupportedError, match="hidden_size"):
        read_spec(str(tmp_path))


def test_an_unknown_architecture_without_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(UNKNOWN))
    with pytest.raises(UnsupportedError) as caught:
        read_spec(str(tmp_path))
    assert "llama" in str(caught.value)
    assert caught.value.exit_code == 1


def test_a_note_says_that_headers_and_config_differ(tmp_path, all_shapes):
    (tmp_path / "config.json").write_text(json.dumps(all_shapes[ID]["config"]))
    write_safetensors(tmp_path / "model.safetensors", {"model.embed_tokens.weight": [10, 10]})
    assert any("headers have 100 values" in note for note in read_spec(str(tmp_path)).notes)


def test_an_unknown_weight_format_needs_headers():
    values = {**UNKNOWN, "model_type": "llama", "intermediate_size": 64}
    with pytest.raises(UnsupportedError, match="'strange'"):
        spec_from_values({**values, "quantization_config": {"quant_method": "strange"}}, name="x")


def test_the_common_families_are_known():
    named = {
        "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3", "phi3",
        "gpt_oss", "deepseek_v2", "deepseek_v3", "olmo2", "granite",
    }  # fmt: skip
    assert named <= set(FAMILIES)


def test_sizing_imports_nothing_heavy():
    import subprocess

    code = (
        "import sys, toolkit.sizing, toolkit.cli.size, toolkit.cli.calibrate;"
        "print([m for m in ('torch', 'transformers', 'vllm', 'yaml', 'pynvml', 'jsonschema')"
        " if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_an_unknown_weight_format_is_as_large_as_its_files(tmp_path, all_shapes, card, run):
    from toolkit.sizing import solve

    values = {**all_shapes[ID]["config"], "quantization_config": {"quant_method": "strange"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    write_safetensors(tmp_path / "model.safetensors", {"model.embed_tokens.weight": [1000, 10]})
    result = solve(run(), read_spec(str(tmp_path)), card("h100"))
    assert result.model.weight_bytes == 20000
    assert result.model.quantization == "as stored"
    assert result.model.margin == UNKNOWN_MARGIN
    assert any("unknown weight format 'strange'" in note for note in result.model.notes)
