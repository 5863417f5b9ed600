"""The main flow of every family, tied and untied, on both engines: train, generate, export merged
weights, and load them with plain transformers.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import engine_checkpoints
import pytest
from safetensors.torch import load_file
from transformers import Qwen2Tokenizer

from toolkit.policy.fingerprint import checkpoint_digest
from toolkit.train.checkpointing.trained_run import export_run, generate_completions, open_run

sys.path.append(str(Path(__file__).resolve().parents[1] / "acceptance"))
from train_world import run_toolkit

pytestmark = pytest.mark.engine

CASES = [
    pytest.param(
        family,
        tied,
        engine,
        id=f"{family}-{'tied' if tied else 'untied'}-{engine}",
        # Only one case, a tied model on vLLM, runs for each change. The other cases are slow.
        marks=(
            pytest.mark.thorough
            if (family, tied, engine) == ("qwen3", True, "vllm")
            else pytest.mark.slow
        ),
    )
    for family in engine_checkpoints.FAMILIES
    for tied in (True, False)
    for engine in ("vllm", "transformers")
]
RUN_FILE = """\
model: {{model_name: model, max_seq_length: 64, dtype: float32, max_lora_rank: 8,
  kv_cache_bytes: 67108864, max_num_seqs: 8, max_num_batched_tokens: 512}}
lora: {{r: 4, lora_alpha: 64, target_modules: {targets}, use_gradient_checkpointing: false}}
dataset: {{path: train.jsonl, prompt: question}}
reward: {{functions: [{{name: "mine:even"}}]}}
grpo: {{max_steps: 2, per_device_train_batch_size: 8, num_generations: 4, max_completion_length: 8,
  learning_rate: 0.05, seed: 3}}
runtime: {{engine: {engine}, output_dir: run, allow_code: [mine]}}
"""
REWARD = """\
def even(completions, **_):
    return [sum(letter in "02468" for letter in text) for text in completions]
"""
TARGETS = {"phi3": "[qkv_proj, o_proj]"}
PROMPT = "t5 t6 t7"
TRANSFORMERS_SCRIPT = """\
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompt = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer(prompt, return_tensors="pt").input_ids
keys = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
out = model.generate(input_ids=ids, **keys)
print(tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True))
"""


def make_qwen2_tokenizer() -> Any:
    """A Qwen2 tokenizer, because transformers 5.17 loads every Qwen2 checkpoint with this class."""
    pieces = ["<pad>", "<bos>", "<eos>", *"0123456789t\u0120"]
    pieces += [f"x{number}" for number in range(len(pieces), engine_checkpoints.VOCAB)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[],
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<eos>",
    )


def make_run_files(folder: Path, family: str, tied: bool, engine: str) -> Path:
    engine_checkpoints.make_checkpoint(folder / "model", family, tie_word_embeddings=tied)
    if family == "qwen2":
        make_qwen2_tokenizer().save_pretrained(folder / "model")
    rows = [{"question": f"t{i} t{i + 1} t{i + 2}"} for i in range(50, 74)]  # t0 to t3 are special
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.py").write_text(REWARD)
    targets = TARGETS.get(family, "[q_proj, k_proj, v_proj, o_proj]")
    run_file = folder / "run.yaml"
    run_file.write_text(RUN_FILE.format(engine=engine, targets=targets))
    return run_file


def generate_with_transformers(folder: Path) -> str:
    """The completion of plain transformers, from a separate process: vLLM changes some of its
    classes.
    """
    command = [sys.executable, "-c", TRANSFORMERS_SCRIPT, str(folder), PROMPT]
    process = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout.strip()


@pytest.mark.parametrize(("family", "tied", "engine"), CASES)
def test_train_generate_export_and_plain_transformers(
    tmp_path: Path, family: str, tied: bool, engine: str
) -> None:
    run_file = make_run_files(tmp_path, family, tied, engine)
    process = run_toolkit("train", str(run_file))
    if (family, tied, engine) == ("gemma2", False, "vllm"):
        # vLLM has no separate head for Gemma 2, and no published model has one.
        assert (process.returncode, "LOAD028" in process.stderr) == (1, True), process.stderr[
            -3000:
        ]
        return
    assert process.returncode == 0, process.stderr[-3000:]
    folder = tmp_path / "run"
    assert json.loads((folder / "manifest.json").read_text())["base"]["unchanged"] is True
    base = json.loads((folder / "adapter" / "base.json").read_text())
    assert base["checkpoint"] == checkpoint_digest(tmp_path / "model")
    weights = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert any(value.abs().max() > 0 for name, value in weights.items() if "lora_B" in name)

    run = open_run(folder)
    [[answer]] = generate_completions(
        run, [PROMPT], engine="transformers", temperature=0.0, max_tokens=8
    )
    export_run(run, tmp_path / "merged", merge=True)
    assert generate_with_transformers(tmp_path / "merged") == answer
    assert generate_with_transformers(tmp_path / "model") != answer
    if engine == "vllm" and family != "qwen3":
        options = ("--engine", "vllm", "--temperature", "0", "--max-tokens", "8")
        generated = run_toolkit("generate", str(folder), PROMPT, *options)
        assert generated.stdout.strip() == answer, generated.stderr[-3000:]
