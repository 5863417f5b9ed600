"""Every family on the real engine: the weights exist only once, and the engine samples from the
trained policy.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import engine_checkpoints
import pytest
import torch
from conftest import small_options
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from toolkit.engine.open_engine import open_engine
from toolkit.engine.rollout_request import Sampling
from toolkit.policy.fingerprint import weights_digest
from toolkit.policy.shared_weights import shared_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    from peft import PeftModel
    from transformers import PreTrainedModel

    from toolkit.engine.engine import Engine

pytestmark = pytest.mark.engine

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL_PROJECTIONS = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
TARGETS = {"phi3": FUSED, "qwen3_moe": ATTENTION}  # experts have no slots
ATTENTION_OF = {"gemma2": "eager"}  # the default attention ignores its soft cap
FAMILIES = list(engine_checkpoints.FAMILIES)
SCALINGS = {
    "alpha=r": (8, False),
    "alpha=2r": (16, False),
    "alpha=r/2": (4, False),
    "rs": (8, True),
}
TOLERANCE = 1e-5  # nats, float32


@dataclass
class Case:
    family: str
    engine: Engine
    model: PreTrainedModel
    tokens: torch.Tensor
    expected: torch.Tensor
    plain: dict[str, tuple[int, ...]]
    weights: str | None


@pytest.fixture(scope="module", params=FAMILIES)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Case]:
    family = request.param
    folder = engine_checkpoints.make_checkpoint(tmp_path_factory.mktemp(family), family)
    # Loaded before the engine starts: vLLM changes some Hugging Face classes permanently (OLMo 2).
    reference = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=ATTENTION_OF.get(family)
    )
    tokens = torch.randint(3, 200, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(tokens).logits
    plain = {name: tuple(p.shape) for name, p in reference.named_parameters()}
    weights = weights_digest(reference)
    del reference
    with open_engine(small_options(folder)) as engine:
        yield Case(family, engine, shared_model(engine), tokens, expected, plain, weights)


def add_random_adapter(case: Case, alpha: int, rslora: bool, spread: float = 0.05) -> PeftModel:
    config = LoraConfig(
        r=8,
        lora_alpha=alpha,
        use_rslora=rslora,
        target_modules=TARGETS.get(case.family, ALL_PROJECTIONS),
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(2)
    policy = get_peft_model(case.model, config)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, spread)
    return policy


def largest_logprob_gap(
    case: Case, policy: Any, seed: int, prompt: list[int] | None = None
) -> float:
    """Largest difference between the log-probabilities of engine and trainer over two
    completions.
    """
    prompt = prompt or case.tokens[0].tolist()
    rollout = case.engine.generate(
        [prompt], Sampling(n=2, max_tokens=16, temperature=0.7), seed=seed
    )
    assert rollout.logprobs is not None
    gaps = []
    for ids, engine_logprobs in zip(rollout.completion_ids, rollout.logprobs, strict=True):
        sequence = torch.tensor([prompt + ids])
        with torch.no_grad():
            logits = policy(sequence).logits[0, len(prompt) - 1 : -1].float() / 0.7
        trainer_logprobs = torch.log_softmax(logits, -1).gather(
            1, sequence[0, len(prompt) :, None]
        )[:, 0]
        gaps.append(
            (trainer_logprobs - torch.tensor([position[0] for position in engine_logprobs]))
            .abs()
            .max()
            .item()
        )
    return max(gaps)


def checksum(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()


def test_logits_equal_those_of_a_separate_load(case: Case) -> None:
    with torch.no_grad():
        assert torch.equal(case.model(case.tokens).logits, case.expected)


def test_parameters_and_digest_equal_those_of_a_separate_load(case: Case) -> None:
    """Tied weights are one parameter under one name, as in the separate load."""
    assert {name: tuple(p.shape) for name, p in case.model.named_parameters()} == case.plain
    assert weights_digest(case.model) == case.weights


def test_no_parameter_has_a_second_copy(case: Case) -> None:
    engine_storages = {p.untyped_storage().data_ptr() for p in case.engine.module.parameters()}
    for name, parameter in case.model.named_parameters():
        assert parameter.untyped_storage().data_ptr() in engine_storages, name
        assert not parameter.requires_grad, name
    # A value that is written to one parameter is read from the other: they share their memory.
    norm = case.model.get_submodule("model.norm").weight
    engine_norm = dict(case.engine.module.named_parameters())["model.norm.weight"]
    previous_value = norm[0].item()
    with torch.no_grad():
        norm[0] = 7.0
    assert engine_norm[0].item() == 7.0
    with torch.no_grad():
        norm[0] = previous_value


@pytest.mark.parametrize("scaling", SCALINGS)
def test_engine_samples_from_the_trained_policy(case: Case, scaling: str) -> None:
    policy = add_random_adapter(case, *SCALINGS[scaling])
    trained = {n: checksum(p) for n, p in policy.named_parameters()}
    try:
        for round_number in range(2):  # publish registers the adapter first, then writes in place
            case.engine.publish(policy)
            assert {n: checksum(p) for n, p in policy.named_parameters()} == trained
            assert largest_logprob_gap(case, policy, seed=round_number) < TOLERANCE
        with policy.disable_adapter():  # a trainer without the adapter must disagree
            assert largest_logprob_gap(case, policy, seed=0) > 100 * TOLERANCE
    finally:
        policy.unload()


def test_a_large_adapter_on_a_prompt_beyond_the_window(case: Case) -> None:
    """Attention scores of ten and more reveal a soft cap that one side ignores. The prompt is
    longer than the sliding windows of 64 tokens.
    """
    generator = torch.Generator().manual_seed(3)
    prompt = torch.randint(3, 200, (90,), generator=generator).tolist()
    policy = add_random_adapter(case, 8, False, spread=0.5)
    try:
        case.engine.publish(policy)
        assert largest_logprob_gap(case, policy, seed=1, prompt=prompt) < TOLERANCE
    finally:
        policy.unload()


def test_logprobs_agree_after_twenty_training_steps(case: Case) -> None:
    policy = add_random_adapter(case, 16, False)
    base = {n: checksum(p) for n, p in policy.named_parameters() if "lora_" not in n}
    weights = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-3)
    start = [w.detach().clone() for w in weights]
    try:
        for _ in range(20):
            optimizer.zero_grad()
            policy(case.tokens, labels=case.tokens).loss.backward()
            optimizer.step()
            case.engine.publish(policy)
        assert all(not torch.equal(a, b) for a, b in zip(start, weights, strict=True))
        assert largest_logprob_gap(case, policy, seed=5) < TOLERANCE
        assert {n: checksum(p) for n, p in policy.named_parameters() if "lora_" not in n} == base
    finally:
        policy.unload()
