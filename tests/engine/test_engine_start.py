"""A run on the engine that starts from an adapter whose layers have different ranks and alphas."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from engine_training import digit_reward, logged_steps, make_trainer
from tiny_llama import make_tiny

from toolkit import FastLanguageModel
from toolkit.config import load_run
from toolkit.policy.language_model import load_policy
from toolkit.policy.lora import adapter_tensors

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine

RUN_FILE = """\
model:
  model_name: {model}
  max_seq_length: 96
  max_num_seqs: 16
  max_num_batched_tokens: 512
  kv_cache_bytes: 67108864
  max_lora_rank: 16
lora: {{adapter_path: {adapter}, use_gradient_checkpointing: false}}
dataset: {{path: train.jsonl}}
reward: {{functions: [{{name: exact_match}}]}}
grpo: {{max_completion_length: 16, max_steps: 1}}
runtime: {{engine: vllm}}
"""


def make_adapter(model: Path, folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """An adapter of random values with ranks 2, 4 and 12."""
    base, _ = FastLanguageModel.from_pretrained(str(model), max_seq_length=96, load_in_4bit=False)
    policy = FastLanguageModel.get_peft_model(
        base,
        r=4,
        lora_alpha=8,
        rank_pattern={"q_proj": 12, r"layers\.0\.mlp\..*_proj": 2},
        alpha_pattern={"v_proj": 2, "layers.1.self_attn.q_proj": 6.5},
        exclude_modules=["layers.1.self_attn.o_proj"],
        use_gradient_checkpointing=False,
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    tensors = {name: value.clone() for name, value in adapter_tensors(policy).items()}
    return policy.save_lora(folder), tensors


@pytest.fixture(autouse=True)
def silence_print(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.print", lambda *a, **k: None)  # HF's PrinterCallback


@pytest.fixture(scope="module")
def started_run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(policy, tokenizer, saved tensors of the adapter)."""
    folder = tmp_path_factory.mktemp("start")
    model = make_tiny(folder / "model")
    adapter, tensors = make_adapter(model, folder / "adapter")
    (folder / "train.jsonl").write_text(8 * '{"prompt": "1+1="}\n')
    (folder / "run.yaml").write_text(RUN_FILE.format(model=model, adapter=adapter))
    policy, tokenizer = load_policy(load_run(folder / "run.yaml"))
    yield policy, tokenizer, tensors
    policy.toolkit_engine.close()


def test_the_adapter_is_loaded_and_published(started_run: Any) -> None:
    policy, _, tensors = started_run
    loaded = adapter_tensors(policy)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert {value.shape[0] for name, value in loaded.items() if ".lora_A." in name} == {2, 4, 12}
    assert not any("layers.1.self_attn.o_proj" in name for name in loaded)
    assert {p.requires_grad for n, p in policy.named_parameters() if "lora_" in n} == {True}
    engine = policy.toolkit_engine
    assert engine.lora_request("default").lora_int_id == 1  # loading publishes the adapter


def test_an_adapter_with_patterns_is_sampled_as_trained(started_run: Any, tmp_path: Path) -> None:
    policy, tokenizer, tensors = started_run
    trainer = make_trainer(
        policy, tokenizer, tmp_path, trainer_arguments={"reward_funcs": digit_reward}, max_steps=3
    )
    trainer.train()
    rows = logged_steps(trainer)
    assert len(rows) == 3
    assert max(row["sampling/logp_gap_max"] for row in rows) < 1e-5
    trained = adapter_tensors(policy)
    assert any(not torch.equal(trained[name], tensors[name]) for name in tensors)
