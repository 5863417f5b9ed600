"""The toolkit's LM head replaces TRL's fused head. If no token is dropped, both heads give the same
outputs for all models, including those that scale or cap their logits.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from toolkit.train.step import kept_set, sampled_head
from toolkit.train.step.sampled_head import sampled_head_installed

pytestmark = pytest.mark.contract

SMALL = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Gemma2": {"final_logit_softcapping": 3.0},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 4.0},
    "FalconH1": {
        "lm_head_multiplier": 0.5, "mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16,
    },
    "Qwen3Moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "output_router_logits": True,
    },
}  # fmt: skip
OUTPUT_NAMES = ("log_probs", "entropy", "aux_loss")


def fake_trainer(model: Any, **options: Any) -> Any:
    return SimpleNamespace(
        model=model,
        accelerator=SimpleNamespace(unwrap_model=lambda one: one),
        args=SimpleNamespace(generation_kwargs=None),
        **options,
    )


def outputs_and_gradient(model: Any, loss: bool = True) -> tuple[Any, torch.Tensor]:
    ids = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100
    model.zero_grad()
    out = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    (out.log_probs.sum() + 0.1 * out.entropy.sum()).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return out, gradient


@pytest.mark.parametrize("family", KINDS)
def test_our_head_gives_the_outputs_of_trls(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **KINDS[family]})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    original_forward = model.forward
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    trl_outputs, trl_gradient = outputs_and_gradient(model)
    monkeypatch.setattr(kept_set, "CHUNK_ELEMENTS", 150)  # three tokens at a time
    # With a top-p slightly below 1 our head runs, but drops no token.
    with sampled_head_installed(fake_trainer(model, temperature=0.7, top_p=1 - 1e-9), model):
        our_outputs, our_gradient = outputs_and_gradient(model)
    for name in OUTPUT_NAMES:
        our_output, trl_output = getattr(our_outputs, name), getattr(trl_outputs, name)
        assert (our_output is None) == (trl_output is None)
        if our_output is not None:
            torch.testing.assert_close(our_output, trl_output, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(our_gradient, trl_gradient, atol=1e-5, rtol=1e-4)
    assert model.forward != original_forward  # TRL's forward is restored
    assert isinstance(outputs_and_gradient(model)[0], FusedCausalLMOutput)


def test_trls_head_runs_if_no_token_is_dropped() -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    with sampled_head_installed(fake_trainer(model, temperature=0.7, top_k=-1, min_p=0.0), model):
        assert isinstance(outputs_and_gradient(model)[0], FusedCausalLMOutput)


def test_without_tokens_to_score_the_output_is_zero_with_a_gradient() -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    add_fused_lm_head(model)
    ids = torch.ones(1, 4, dtype=torch.int64)
    with sampled_head_installed(fake_trainer(model, top_k=3, repetition_penalty=1.1), model):
        out = model(
            input_ids=ids,
            attention_mask=ids,
            labels=torch.full_like(ids, -100),
            fused_lm_head=True,
        )
        assert out.log_probs.tolist() == [[0.0] * 3]
        out.log_probs.sum().backward()
        model_output = model(input_ids=ids)  # any other call uses the model's own forward
    assert model_output.logits.shape == (1, 4, 50)


def test_trl_calls_the_fused_head_with_these_arguments() -> None:
    import inspect

    from trl import GRPOTrainer

    source = inspect.getsource(GRPOTrainer._get_per_token_logps_and_entropies)
    assert "model(**model_inputs, labels=labels, fused_lm_head=True)" in source
    assert "labels[:, :-logits_to_keep] = -100" in source
    for name in OUTPUT_NAMES:
        assert f"outputs.{name}" in source
    head_source = inspect.getsource(add_fused_lm_head)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling"):
        assert name in head_source
        assert name in inspect.getsource(sampled_head.logit_scale)
