"""``envcheck size`` on a run file whose micro-batch and LoRA target modules are auto."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from size_world import EIGHT_B, make_model, run_envcheck

if TYPE_CHECKING:
    from pathlib import Path

MIXTURE = "Qwen/Qwen3-30B-A3B"
RUN = """\
model: {{model_name: {model}, max_seq_length: 1024}}
lora: {{r: 16, target_modules: auto}}
dataset: {{path: missing.jsonl}}
reward: {{functions: [{{name: length}}]}}
grpo:
  max_completion_length: 512
  max_prompt_length: 512
  generation_batch_size: 64   # completions of a step
  per_device_train_batch_size: auto  # sized
  gradient_accumulation_steps: auto
runtime: {{engine: vllm}}
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(RUN.format(model=make_model(tmp_path, EIGHT_B)))
    return path


def size_choice(run_file: Path, gpu: str, *more: str) -> dict[str, Any]:
    report = json.loads(run_envcheck("size", run_file, "--gpu", gpu, "--json", *more).stdout)
    choice: dict[str, Any] = report["choice"]
    return choice


def batch_split(choice: dict[str, Any]) -> tuple[int, int]:
    return choice["per_device_train_batch_size"], choice["gradient_accumulation_steps"]


def test_a_small_gpu_uses_gradient_accumulation_for_the_same_batch(run_file: Path) -> None:
    kept = (
        *("--set", "lora.use_gradient_checkpointing=true"),
        *("--set", "runtime.padding_free=false"),  # batches with padding_free are split by tokens
        *("--set", "runtime.fused_kernels=false"),
    )
    small, large = (batch_split(size_choice(run_file, card, *kept)) for card in ("l40s", "h200"))
    assert large == (64, 1)
    assert 1 <= small[0] < 64
    assert small[0] * small[1] == 64
    assert batch_split(size_choice(run_file, "h200", "--world-size", "4", *kept)) == (16, 1)


def test_a_smaller_batch_without_checkpointing_is_preferred(run_file: Path) -> None:
    roomy, small = size_choice(run_file, "h200"), size_choice(run_file, "4090")
    assert roomy["gradient_checkpointing"] is False
    assert batch_split(roomy) == (16, 4)
    assert small["gradient_checkpointing"] is True


def test_write_puts_the_batch_split_into_the_file(run_file: Path) -> None:
    micro, accumulation = batch_split(size_choice(run_file, "l40s"))
    output = run_envcheck("size", run_file, "--gpu", "l40s", "--write").stdout
    assert f"run.yaml: per_device_train_batch_size: {micro}" in output
    text = run_file.read_text()
    assert f"  per_device_train_batch_size: {micro}  # sized\n" in text
    assert f"  gradient_accumulation_steps: {accumulation}\n" in text
    assert 'target_modules: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"' in text
    assert batch_split(size_choice(run_file, "l40s")) == (micro, accumulation)


def test_the_table_marks_the_chosen_batch_split(run_file: Path) -> None:
    lines = run_envcheck("size", run_file, "--gpu", "h200").stdout.splitlines()
    row = next(line for line in lines if line.startswith("micro-batch x accumulation"))
    assert "16 x 4" in row
    assert row.endswith("chosen")


def test_the_adapter_of_a_mixture_of_experts_is_on_its_attention(tmp_path: Path) -> None:
    run_file = tmp_path / "run.yaml"
    text = RUN.format(model=make_model(tmp_path, MIXTURE))
    run_file.write_text(text.replace("grpo:", "grpo:\n  router_aux_loss_coef: 0.0"))
    output = run_envcheck("size", run_file, "--gpu", "h200").stdout
    assert "q_proj, k_proj, v_proj, o_proj" in output
    assert "note: in this mixture of experts the adapter is on" in " ".join(output.split())
    named = ["--set", "lora.target_modules=[q_proj, up_proj]"]
    refused = run_envcheck("size", run_file, "--gpu", "h200", *named, code=1)
    assert "LORA013" in refused.stdout + refused.stderr


@pytest.mark.parametrize("half", ["fp16", "bf16"])
def test_a_written_half_precision_format_is_valid(run_file: Path, half: str) -> None:
    """``--write`` sets dtype to the half-precision format that grpo.fp16 or grpo.bf16 selects."""
    text = run_file.read_text().replace("max_seq_length: 1024", "max_seq_length: 1024, dtype: auto")
    run_file.write_text(text.replace("grpo:\n", f"grpo:\n  {half}: true\n"))
    run_envcheck("size", run_file, "--gpu", "h200", "--write")
    assert f"dtype: {'float16' if half == 'fp16' else 'bfloat16'}" in run_file.read_text()
    (run_file.parent / "missing.jsonl").write_text(8 * '{"prompt": "a"}\n')
    run_envcheck("validate", run_file, "--set", "reward.functions=[{name: exact_match}]")
