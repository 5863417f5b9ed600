"""The usage examples of the drop-in API, as users write them, with a local checkpoint and without
an engine.

Each example runs as a separate program, as a user would run it. Only the checkpoint's name and
``fast_inference=False`` come from the test. Without a GPU, ``load_in_4bit=True`` is an error, which
says what to pass instead.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

LOAD = """
from toolkit import FastLanguageModel

def main():
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name={folder!r}, max_seq_length=1024, load_in_4bit={bits}, fast_inference={fast},
        max_lora_rank=64, gpu_memory_utilization={share})
"""
HIDE_VLLM = 'import sys\nsys.modules["vllm"] = None\n'
FIRST = """
    model = FastLanguageModel.get_peft_model(model, r=64, lora_alpha=64,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj",
                        "gate_proj", "up_proj", "down_proj"],
        use_gradient_checkpointing="unsloth")
"""
SECOND = """
    model = FastLanguageModel.get_peft_model(model, r=32, lora_alpha=32,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
"""
TRAIN = """
    from datasets import Dataset
    from trl import GRPOConfig
    from toolkit import GRPOTrainer

    def digits(completions, **columns):
        return [sum(c.isdigit() for c in completion) / 8 for completion in completions]

    args = GRPOConfig(output_dir={output!r}, max_steps=2, per_device_train_batch_size=4,
        num_generations=4, max_completion_length=8, learning_rate=1e-2, beta=0.0, bf16=False,
        use_cpu=True, report_to=[], save_strategy="no", logging_steps=1)
    before = {{n: p.detach().clone() for n, p in model.named_parameters()}}
    trainer = GRPOTrainer(model=model, processing_class=tokenizer, reward_funcs=[digits], args=args,
        train_dataset=Dataset.from_list([{{"prompt": "12+3="}}] * 8))
    trainer.train()
    changed = {{n for n, p in model.named_parameters() if not p.equal(before[n])}}
    assert changed and all(".lora_" in n for n in changed), sorted(changed)[:3]
    model.save_lora({output!r} + "/grpo_saved_lora")
    text = tokenizer.decode(tokenizer("12+3=").input_ids)
    output = model.fast_generate([text], max_tokens=8, temperature=0,
        lora_request=model.load_lora({output!r} + "/grpo_saved_lora"))[0].outputs[0].text
    assert output == model.fast_generate(text, max_tokens=8, temperature=0)[0].outputs[0].text
"""
END = """
    import peft
    print(type(model) is peft.PeftModelForCausalLM, model.peft_config["default"].r)

if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sys.path.append(str(ROOT / "tests" / "fixtures"))
    from tiny_llama import make_tiny

    return make_tiny(tmp_path_factory.mktemp("drop-in") / "tiny", max_position_embeddings=2048)


def _run(text: str, tmp_path: Path, **values: object) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "example.py"
    script.write_text(text.format(output=str(tmp_path / "out"), **values))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=tmp_path,
        env=environment,
        check=False,
    )


def test_the_first_example_trains(folder: Path, tmp_path: Path) -> None:
    values = {"folder": str(folder), "bits": False, "fast": False, "share": 0.5}
    result = _run(LOAD + FIRST + TRAIN + END, tmp_path, **values)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "True 64"


def test_the_second_example_with_a_lower_rank(folder: Path, tmp_path: Path) -> None:
    """The example also runs on a machine without vLLM."""
    values = {"folder": str(folder), "bits": False, "fast": False, "share": 0.6}
    result = _run(HIDE_VLLM + LOAD + SECOND + END, tmp_path, **values)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "True 32"
    assert "because there is no engine: gpu_memory_utilization" in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="the error needs a machine without a GPU")
def test_4_bit_loading_without_a_gpu_is_an_error(folder: Path, tmp_path: Path) -> None:
    values = {"folder": str(folder), "bits": True, "fast": False, "share": 0.5}
    result = _run(LOAD + FIRST + END, tmp_path, **values)
    assert result.returncode == 1
    assert "load_in_4bit=True needs an NVIDIA GPU" in result.stderr
    assert "fix: pass load_in_4bit=False" in result.stderr


def test_without_vllm_the_error_names_the_extra(folder: Path, tmp_path: Path) -> None:
    values = {"folder": str(folder), "bits": False, "fast": True, "share": 0.5}
    result = _run(HIDE_VLLM + LOAD + FIRST + END, tmp_path, **values)
    assert result.returncode == 1
    assert "MissingExtraError" in result.stderr
    assert "pip install 'grpo-toolkit[vllm]'" in result.stderr
