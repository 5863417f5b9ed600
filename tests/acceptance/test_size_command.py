"""The installed command ``envcheck size``, from end to end."""

import json
import stat
import subprocess
import sys
from functools import partial

import pytest
from size_world import EIGHT_B, ONE_B, make_model, run_envcheck

RUN = """\
# my run
model:
  model_name: {model}   # the base
  max_seq_length: 2048
  max_lora_rank: auto  # sized
  gpu_memory_utilization: "auto"
lora:
  r: 24
  use_gradient_checkpointing: auto
dataset: {{path: missing.jsonl}}
reward: {{functions: [{{name: length}}]}}
grpo: {{max_completion_length: 512, max_prompt_length: 512, max_steps: 3}}
runtime: {{engine: vllm}}
"""


@pytest.fixture
def model(tmp_path):
    """A function that makes a model folder with a real config and no weights."""
    return partial(make_model, tmp_path)


@pytest.fixture
def run_file(tmp_path, model):
    path = tmp_path / "run.yaml"
    path.write_text(RUN.format(model=model(EIGHT_B)))
    return path


def test_json_has_the_documented_keys(model):
    report = json.loads(run_envcheck("size", model(EIGHT_B), "--gpu", "h200", "--json").stdout)
    assert report["model"]["parameters"] == 8030261248
    assert report["model"]["weight_bytes"] == 2 * 8030261248
    assert report["model"]["kv_bytes_per_token"] == 131072
    # Rank 16 in bf16: 32 layers with seven projections. By default, vLLM adds embeddings and head.
    projections = 16 * 32 * (2 * 2 * 4096 + 2 * (4096 + 1024) + 3 * (4096 + 14336)) * 2
    assert report["engine"]["lora_slots_bytes"] == projections
    assert report["engine"]["lora_bytes"] == projections + 2 * 16 * (128256 + 4096) * 2
    assert 0 < report["interval"]["min"] < report["interval"]["max"] < 1
    assert report["choice"]["gpu_memory_utilization"] == report["interval"]["max"]
    assert report["choice"]["max_lora_rank"] == 16
    assert {"term", "bytes", "source"} <= set(report["budget"][0])
    assert report["device"]["here"] is False


def test_the_text_has_all_parts(model):
    text = run_envcheck("size", model(EIGHT_B), "--gpu", "h100", "--set", "lora.r=64").stdout
    words = " ".join(text.split())  # long lines are wrapped
    assert "8.030 B parameters, bfloat16 14.96 GiB, KV 128.0 KiB per token" in words
    assert "gpu_memory_utilization from 0." in text
    assert "at least" in text
    assert "at most" in text
    for term in ("engine.weights", "engine.lora", "engine.kv", "trainer.activations", "context"):
        assert term in text
    bars = [line for line in text.splitlines() if line.startswith(("rollouts [", "training ["))]
    assert len(bars) == 2
    assert all("W" in bar and "K" in bar and bar.endswith("79.2 GiB") for bar in bars)
    assert "64*: 320.0 MiB" in text
    assert max(len(line) for line in text.splitlines()) <= 110


@pytest.mark.parametrize(
    "name", ["Qwen/Qwen3-30B-A3B", "deepseek-ai/DeepSeek-V3", "openai/gpt-oss-20b"]
)
def test_other_architectures_are_sized(model, name):
    run_envcheck("size", model(name), "--gpu", "b200", "--json", code=0 if "V3" not in name else 1)


def test_a_run_file_is_sized(run_file):
    """A dataset that does not exist on this machine does not prevent sizing."""
    text = run_envcheck("size", run_file, "--gpu", "h100").stdout
    assert "model.max_lora_rank              32" in text


def test_a_run_file_without_a_number_of_steps_is_sized(tmp_path, model):
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{model_name: {model(EIGHT_B)}}}\nreward: {{functions: []}}\n")
    assert "gpu_memory_utilization from" in run_envcheck("size", path, "--gpu", "h100").stdout


def test_write_replaces_only_auto(run_file):
    before = run_file.read_text()
    run_file.chmod(0o600)
    result = run_envcheck("size", run_file, "--gpu", "h100", "--write")
    after = run_file.read_text()
    assert stat.S_IMODE(run_file.stat().st_mode) == 0o600
    assert "max_lora_rank: 32  # sized" in after
    assert "# my run" in after
    assert ": auto" not in after
    assert '"auto"' not in after
    changed = [
        (old, new)
        for old, new in zip(before.splitlines(), after.splitlines(), strict=True)
        if old != new
    ]
    assert len(changed) == 3
    names = ("max_lora_rank: 32", "use_gradient_checkpointing: ", "gpu_memory_utilization: 0.")
    for name in names:
        assert name in result.stdout
    again = run_envcheck("size", run_file, "--gpu", "h100", "--write").stdout
    assert 'contains no "auto"' in again


def test_write_keeps_values_that_it_cannot_replace(tmp_path, model):
    """``--write`` does not replace an ``auto`` that is a YAML alias, anchor or block."""
    path = tmp_path / "run.yaml"
    before = (
        f"model:\n  model_name: {model(ONE_B)}\n  max_lora_rank: &all auto\n"
        "  gpu_memory_utilization: *all\n  max_num_seqs: >-\n    auto\n  dtype: 'auto'\n"
        "reward: {functions: [{name: length}]}\ngrpo: {max_steps: 1}\n"
    )
    path.write_text(before)
    output = run_envcheck("size", path, "--gpu", "h100", "--write").stdout
    assert path.read_text() == before.replace("'auto'", "bfloat16")
    for name in ("max_lora_rank: 16", "gpu_memory_utilization: 0.", "max_num_seqs: 8"):
        assert f"not written: model.{name}" in output
    assert output.count('(this "auto" is a YAML alias, anchor or block)') == 3


def test_write_works_for_json_and_toml(tmp_path, model):
    import tomllib

    folder = model(ONE_B)
    values = {
        "model": {"model_name": str(folder), "max_seq_length": 512, "max_lora_rank": "auto"},
        "reward": {"functions": [{"name": "length"}]},
        "grpo": {"max_steps": 1, "max_completion_length": 128},
        "runtime": {"engine": "vllm"},
    }
    as_json = tmp_path / "run.json"
    as_json.write_text(json.dumps(values, indent=1))
    run_envcheck("size", as_json, "--gpu", "l4", "--write")
    assert json.loads(as_json.read_text())["model"]["max_lora_rank"] == 16
    as_toml = tmp_path / "run.toml"
    as_toml.write_text(
        f'[model]\nmodel_name = "{folder}"\nmax_seq_length = 512\nmax_lora_rank = "auto" # keep\n'
        '[[reward.functions]]\nname = "length"\n[grpo]\nmax_steps = 1\n'
        'max_completion_length = 128\n[runtime]\nengine = "vllm"\n'
    )
    run_envcheck("size", as_toml, "--gpu", "l4", "--write")
    assert tomllib.loads(as_toml.read_text())["model"]["max_lora_rank"] == 16
    assert "# keep" in as_toml.read_text()


def test_without_write_nothing_is_written(run_file, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    run_envcheck("size", run_file, "--gpu", "h100", "--json")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_an_empty_interval_lists_changes_with_their_memory(run_file):
    result = run_envcheck("size", run_file, "--gpu", "t4", "--set", "lora.r=64", code=1)
    assert "no value is possible" in result.stdout
    enough = "(enough)" in result.stdout
    first = "changes that are enough alone come first, then"
    order = first if enough else "no single change is enough;"
    assert f"what each change would free ({order} the least harmful come first):" in result.stdout
    assert "load_in_4bit: true frees" in result.stdout
    json_result = run_envcheck("size", run_file, "--gpu", "t4", "--json", code=1)
    assert json.loads(json_result.stdout)["feasible"] is False
    assert "frees" in json_result.stderr


def test_a_utilization_above_the_maximum_is_an_error(run_file):
    override = ["--set", "model.gpu_memory_utilization=0.97"]
    awake = ["--set", "model.enable_sleep_mode=false"]
    result = run_envcheck("size", run_file, "--gpu", "h100", *override, *awake, code=1)
    assert "0.97 is above" in result.stderr
    assert "fix:" in result.stderr
    left_open = run_envcheck("size", run_file, "--gpu", "h100", *override, "--json")
    # 0.97 is only possible with sleep mode, which is auto here, so sizing enables it.
    assert json.loads(left_open.stdout)["choice"]["enable_sleep_mode"] is True


def test_both_topologies_are_sized(model):
    shared, twice = (
        json.loads(
            run_envcheck(
                "size", model(EIGHT_B), "--gpu", "h200", "--json",
                "--set", f"model.share_weights={word}", "--set", "runtime.engine=vllm",
            ).stdout
        )
        for word in ("true", "false")
    )  # fmt: skip
    assert shared["interval"]["max"] > twice["interval"]["max"]
    assert "trainer.weights" in [line["term"] for line in twice["budget"]]


def test_a_run_on_the_cpu_is_sized(model):
    report = json.loads(run_envcheck("size", model(ONE_B), "--cpu", "--json").stdout)
    assert report["device"] is None
    assert report["interval"]["min"] is None
    assert report["choice"]["dtype"] == "float32"


def test_size_is_fast_and_imports_no_heavy_library(model):
    """The test limits the CPU time, because the wall time depends on the load of the machine."""
    folder = model(EIGHT_B)
    code = (
        "import sys, time; start = time.process_time();"
        "from toolkit.cli.envcheck import cli;"
        f"cli(['size', {str(folder)!r}, '--gpu', 'h200', '--json'], standalone_mode=False);"
        "heavy = {'torch', 'transformers', 'vllm', 'numpy', 'jsonschema', 'pynvml'};"
        "print(time.process_time() - start, sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    runs = []
    for _ in range(3):
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        seconds, _, heavy = result.stderr.strip().partition(" ")
        assert heavy == "[]"
        runs.append(float(seconds))
    assert min(runs) < 0.3
