"""The first example of the drop-in API runs unchanged: it trains 4-bit weights with an engine.

Only the checkpoint is replaced: it is a folder with random weights of a small Llama.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")
pytest.importorskip("bitsandbytes")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

EXAMPLE = """
import sys
from toolkit import FastLanguageModel

def main(folder, output):
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=folder, max_seq_length=1024, load_in_4bit=True,
        fast_inference=True, max_lora_rank=64, gpu_memory_utilization=0.5)
    model = FastLanguageModel.get_peft_model(model, r=64, lora_alpha=64,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj",
                        "gate_proj", "up_proj", "down_proj"],
        use_gradient_checkpointing="unsloth")

    from datasets import Dataset
    from trl import GRPOConfig
    from toolkit import GRPOTrainer

    def digits(completions, **columns):
        return [sum(c.isdigit() for c in completion) / 8 for completion in completions]

    args = GRPOConfig(output_dir=output, max_steps=3, per_device_train_batch_size=8,
        num_generations=8, max_completion_length=32, learning_rate=1e-4, beta=0.0, bf16=True,
        report_to=[], save_strategy="no", logging_steps=1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = GRPOTrainer(model=model, processing_class=tokenizer, reward_funcs=[digits], args=args,
        train_dataset=Dataset.from_list([{"prompt": "12+3="}] * 16))
    dtypes = {str(p.dtype) for n, p in model.named_parameters() if ".lora_" in n}
    assert dtypes == {"torch.float32"}, dtypes  # TRL has cast the adapter to bfloat16 meanwhile
    trainer.train()
    assert trainer.base_check["unchanged"], trainer.base_check
    changed = {n for n, p in model.named_parameters() if not p.equal(before[n])}
    assert changed and all(".lora_" in n for n in changed), sorted(changed)[:3]
    gaps = [row["sampling/logp_gap_mean"] for row in trainer.state.log_history
            if "sampling/logp_gap_mean" in row]
    assert len(gaps) == 3, trainer.state.log_history
    model.save_lora(output + "/grpo_saved_lora")
    text = model.fast_generate(["12+3="], lora_request=model.load_lora(output + "/grpo_saved_lora"))
    assert text[0].outputs[0].token_ids
    print("gap", max(gaps), type(model).__name__, model.peft_config["default"].r)

if __name__ == "__main__":
    main(*sys.argv[1:])
"""


def test_the_first_example_of_the_api_runs_unchanged(tmp_path: Path) -> None:
    sys.path.append(str(Path(__file__).resolve().parents[1] / "fixtures"))
    from tiny_llama import make_tiny

    sizes = {"hidden_size": 512, "head_dim": 64, "intermediate_size": 1024}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 4}
    folder = make_tiny(
        tmp_path / "tiny", max_position_embeddings=2048, dtype="bfloat16", **sizes, **heads
    )
    script = tmp_path / "example.py"
    script.write_text(EXAMPLE)
    result = subprocess.run(
        [sys.executable, str(script), str(folder), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    word, gap, kind, rank = result.stdout.splitlines()[-1].split()
    assert (word, kind, rank) == ("gap", "PeftModelForCausalLM", "64")
    assert float(gap) < 0.1  # nats, in bfloat16 with 4-bit weights; random weights enlarge the gap
