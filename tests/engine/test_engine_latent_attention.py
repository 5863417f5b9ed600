"""Multi-head latent attention (DeepSeek V2 and V3): the projections on which the engine applies an
adapter.

vLLM 0.31's CPU kernel for interleaved rotary embeddings treats a query of three dimensions as one
of two and rotates only its first head, so the engine's own check refuses these models on the CPU.
These tests compute the embeddings in plain torch instead. The GPU kernel is correct.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import engine_checkpoints
import pytest
import torch
from conftest import small_options
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from toolkit.base.errors import UnsupportedError
from toolkit.config.lora_targets import SLOT_LAYERS
from toolkit.engine.open_engine import open_engine
from toolkit.engine.rollout_request import Sampling

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.engine, pytest.mark.slow]

LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,  # the CPU's decode kernel supports only 512 with a rope dimension of 64
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": False,
}
FAMILIES = {
    "deepseek_v2": (
        "DeepseekV2",
        LATENT | {"q_lora_rank": None, "topk_method": "greedy", "norm_topk_prob": False},
    ),
    "deepseek_v3": (
        "DeepseekV3",
        LATENT | {"q_lora_rank": 48, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    ),
}
FOLLOWED = {
    "deepseek_v2": ("q_proj", "kv_a_proj_with_mqa", "o_proj"),
    "deepseek_v3": ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"),
}
TOLERANCE = 1e-5  # nats, float32
PROMPT = list(range(3, 27))


@pytest.mark.parametrize("family", FAMILIES)
def test_projections_of_latent_attention(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(engine_checkpoints.FAMILIES, family, FAMILIES[family])
    folder = engine_checkpoints.make_checkpoint(tmp_path, family)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    slots = (*SLOT_LAYERS, *FOLLOWED[family], "kv_b_proj")
    with open_engine(small_options(folder, lora_target_modules=slots)) as engine:
        for module in engine.module.modules():
            if type(module).__name__.endswith("RotaryEmbedding"):
                module._forward_method = module.forward_native
        assert _largest_logprob_gap(engine, model) < TOLERANCE
        for target in FOLLOWED[family]:
            policy = _add_adapter(model, target)
            engine.publish(policy)
            assert _largest_logprob_gap(engine, policy) < TOLERANCE, target
            with policy.disable_adapter():
                assert _largest_logprob_gap(engine, policy) > 100 * TOLERANCE, target
            policy.unload()
        policy = _add_adapter(model, "kv_b_proj")
        with pytest.raises(UnsupportedError, match="ignores an adapter on"):
            engine.publish(policy)


def _add_adapter(model: Any, target: str) -> Any:
    policy = get_peft_model(
        model, LoraConfig(r=8, lora_alpha=8, target_modules=[target], task_type="CAUSAL_LM")
    )
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5)
    return policy


def _largest_logprob_gap(engine: Any, policy: Any) -> float:
    """Largest difference between the log-probabilities of engine and trainer. It covers prefill and
    decode: the first token follows the prefill, which has its own computation.
    """
    rollout = engine.generate([PROMPT], Sampling(n=1, max_tokens=16, temperature=0.7), seed=0)
    ids = rollout.completion_ids[0]
    sequence = torch.tensor([PROMPT + ids])
    with torch.no_grad():
        logits = policy(sequence).logits[0, len(PROMPT) - 1 : -1].float() / 0.7
    trainer_logprobs = torch.log_softmax(logits, -1).gather(1, sequence[0, len(PROMPT) :, None])[
        :, 0
    ]
    engine_logprobs = torch.tensor([position[0] for position in rollout.logprobs[0]])
    return float((trainer_logprobs - engine_logprobs).abs().max())
