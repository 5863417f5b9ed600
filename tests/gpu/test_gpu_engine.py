"""Tests of the engine that need a GPU: bfloat16, CUDA graphs, KV-only sleep, and 4-bit weights. Run
them with ``just test-gpu``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

if TYPE_CHECKING:
    from collections.abc import Callable

    from toolkit.engine.engine import Engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MODEL_SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "head_dim": 64,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import engine_checkpoints

    return engine_checkpoints.make_checkpoint(
        tmp_path_factory.mktemp("gpu"), "llama", **MODEL_SIZES
    )


@pytest.fixture
def open_gpu(folder: Path) -> Callable[..., Engine]:
    from toolkit.engine.engine_options import EngineOptions
    from toolkit.engine.open_engine import open_engine

    def opened(**changes: Any) -> Engine:
        settings = {
            "max_model_len": 256,
            "dtype": "bfloat16",
            "gpu_memory_utilization": 0.2,
            "max_num_seqs": 16,
        }
        return open_engine(EngineOptions(model=str(folder), **(settings | changes)))

    return opened


def model_with_adapter(engine: Engine) -> Any:
    """The shared model with a non-zero float32 adapter."""
    from peft import LoraConfig, get_peft_model

    from toolkit.policy.shared_weights import shared_model

    torch.manual_seed(0)
    config = LoraConfig(r=16, lora_alpha=32, target_modules=SEVEN)
    policy = get_peft_model(shared_model(engine), config)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    return policy


def mean_logp_gap(engine: Engine, policy: Any) -> float:
    """Mean difference between the log-probabilities of engine and trainer over the sampled tokens,
    in nats.
    """
    from toolkit.engine.rollout_request import Sampling

    prompt = list(range(3, 40))
    rollout = engine.generate([prompt], Sampling(n=4, max_tokens=32), seed=1)
    assert rollout.logprobs is not None
    gaps = []
    for ids, values in zip(rollout.completion_ids, rollout.logprobs, strict=True):
        tokens = torch.tensor([prompt + ids], device="cuda")
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
            logits = policy(tokens).logits[0, len(prompt) - 1 : -1].float()
        ours = torch.log_softmax(logits, -1).gather(1, tokens[0, len(prompt) :, None])[:, 0]
        gaps.append((ours - torch.tensor([v[0] for v in values], device="cuda")).abs().mean())
    return float(torch.stack(gaps).mean())


def test_bfloat16_with_cuda_graphs_samples_the_trained_policy(
    open_gpu: Callable[..., Engine], folder: Path
) -> None:
    from transformers import AutoModelForCausalLM

    with open_gpu() as engine:
        before = torch.cuda.memory_allocated()
        policy = model_with_adapter(engine)
        assert torch.cuda.memory_allocated() - before < 8 << 20  # adapter and rotary tables only
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda()
        tokens = torch.arange(3, 60, device="cuda")[None]
        with torch.no_grad(), policy.disable_adapter():
            assert torch.equal(policy(tokens).logits, reference(tokens).logits)
        for _ in range(3):  # publish registers the adapter, then writes in place (captured graphs)
            engine.publish(policy)
            assert mean_logp_gap(engine, policy) < 0.03
            with torch.no_grad():
                for name, parameter in policy.named_parameters():
                    if "lora_B" in name:
                        parameter.mul_(-1.1)


def test_kv_only_sleep_frees_the_cache_and_keeps_the_weights(
    open_gpu: Callable[..., Engine],
) -> None:
    from toolkit.engine.rollout_request import Sampling

    sampling = Sampling(n=4, max_tokens=16)
    with open_gpu(enable_sleep_mode=True) as engine:
        policy = model_with_adapter(engine)
        engine.publish(policy)
        expected = engine.generate([[5, 6, 7]], sampling, seed=1)
        tokens = torch.arange(3, 60, device="cuda")[None]
        with torch.no_grad():
            logits = policy(tokens).logits
        free = torch.cuda.mem_get_info()[0]
        for _ in range(2):
            engine.sleep()
            assert torch.cuda.mem_get_info()[0] > free + (1 << 30)
            with torch.no_grad():
                assert torch.equal(policy(tokens).logits, logits)  # works while the engine sleeps
            engine.publish(policy)
            assert engine.generate([[5, 6, 7]], sampling, seed=1) == expected  # wakes by itself


def test_4bit_layers_share_the_packed_weights(open_gpu: Callable[..., Engine]) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    with open_gpu(load_in_4bit=True, enforce_eager=True) as engine:
        policy = model_with_adapter(engine)
        storages = {p.data.untyped_storage().data_ptr() for p in engine.module.parameters()}
        layers = [m for m in policy.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
        assert len(layers) == 2 * len(SEVEN)
        assert all(m.weight.data.untyped_storage().data_ptr() in storages for m in layers)
        engine.publish(policy)
        assert mean_logp_gap(engine, policy) < 0.05
        loss = policy(torch.arange(3, 60, device="cuda")[None]).logits.float().square().mean()
        loss.backward()
        trained = [p for p in policy.parameters() if p.requires_grad]
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trained)


@pytest.mark.parametrize("dequantized_rollouts", [True, 3 << 20])
@pytest.mark.parametrize("sleep", [False, True])
def test_rollouts_with_16bit_copies_of_4bit_weights(
    open_gpu: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
    dequantized_rollouts: Any,
    sleep: bool,
) -> None:
    """With captured CUDA graphs: between two rollouts the copies' memory is free for the trainer,
    each rollout gives the same tokens, and the gap is not larger than without copies. One process
    opens both engines, one after the other.
    """
    pytest.importorskip("bitsandbytes")
    from toolkit.base.errors import ConfigError
    from toolkit.engine.dequantized import COPIES_ATTRIBUTE, find_4bit_layers
    from toolkit.engine.rollout_request import Sampling

    prompts, sampling = [list(range(3, 40)), list(range(9, 25))], Sampling(n=4, max_tokens=32)
    with open_gpu(load_in_4bit=True, dequantized_rollouts=False) as engine:
        assert getattr(engine.module, COPIES_ATTRIBUTE, None) is None
        policy = model_with_adapter(engine)
        engine.publish(policy)
        packed, gap = engine.generate(prompts, sampling, seed=1), mean_logp_gap(engine, policy)
        del policy
    with open_gpu(
        load_in_4bit=True, dequantized_rollouts=dequantized_rollouts, enable_sleep_mode=sleep
    ) as engine:
        copies = getattr(engine.module, COPIES_ATTRIBUTE)
        layers = len(find_4bit_layers(engine.module))
        assert (
            len(copies._packed_weights) == layers
            if dequantized_rollouts is True
            else 0 < len(copies._packed_weights) < layers
        )
        assert dequantized_rollouts is True or copies.nbytes <= dequantized_rollouts
        policy = model_with_adapter(engine)
        engine.publish(policy)
        expected = engine.generate(prompts, sampling, seed=1)
        addresses = [tensor.data_ptr() for tensor in copies._copies]
        torch.cuda.empty_cache()
        awake = torch.cuda.mem_get_info()[0]
        for _ in range(3):
            engine.sleep()
            torch.cuda.empty_cache()
            assert torch.cuda.mem_get_info()[0] - awake >= copies.nbytes // 2
            loss = policy(torch.arange(3, 60, device="cuda")[None]).logits.float().square().mean()
            loss.backward()  # the trainer works on the packed weights meanwhile
            engine.publish(policy)
            again = engine.generate(prompts, sampling, seed=1)
            assert again.completion_ids == expected.completion_ids
        assert [tensor.data_ptr() for tensor in copies._copies] == addresses
        assert mean_logp_gap(engine, policy) <= 1.25 * gap + 2e-3
        # A batch of one row uses another kernel, so one of two nearly equal tokens may be exchanged
        # for the other.
        pairs = zip(packed.completion_ids, expected.completion_ids, strict=True)
        assert sum(a[:4] == b[:4] for a, b in pairs) >= len(prompts) * sampling.n // 2
        total = torch.cuda.mem_get_info()[1]
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1 << 10, total))
        with pytest.raises(ConfigError, match="16-bit copies") as caught:
            copies.check_fits()
        assert "dequantized_rollouts" in str(caught.value.where)
