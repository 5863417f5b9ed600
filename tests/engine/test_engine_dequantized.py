"""4-bit layers over 16-bit copies while a rollout runs: the same completions, memory that comes and
goes, and rollouts in parts. bitsandbytes and CUDA graphs: tests/gpu.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import engine_checkpoints
import engine_training as training
import pytest
import stand_in_4bit
import torch
from conftest import options
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from toolkit.base.errors import ConfigError, ToolkitError, ToolkitWarning
from toolkit.engine import dequantized
from toolkit.engine import token_generation as generation
from toolkit.engine.dequantized import (
    COPIES_ATTRIBUTE,
    DequantizedMethod,
    copy_bytes,
    find_4bit_layers,
)
from toolkit.engine.rollout_request import Sampling

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from toolkit.engine.engine import Engine

pytestmark = pytest.mark.engine
PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [12, 13]]
SAMPLING = Sampling(n=2, max_tokens=12)


@pytest.fixture(scope="module")
def adapter(llama_folder: Path) -> Any:
    """A model with an adapter that changes what is drawn."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model


def draw(engine: Engine, adapter: Any) -> Any:
    engine.publish(adapter)
    return engine.generate(PROMPTS, SAMPLING, seed=3).as_tuple()


@pytest.fixture(scope="module")
def as_packed(llama_folder: Path, adapter: Any) -> Any:
    """What the engine draws when every product dequantizes its weight."""
    with stand_in_4bit.open_packed(options(llama_folder), False) as engine:
        assert getattr(engine.module, COPIES_ATTRIBUTE, None) is None
        return draw(engine, adapter)


@pytest.fixture(scope="module")
def engine(llama_folder: Path, as_packed: Any) -> Iterator[Engine]:
    """A second engine in this process, with copies of all layers."""
    del as_packed
    with stand_in_4bit.open_packed(options(llama_folder), True) as opened:
        yield opened


def held(engine: Engine) -> int:
    """Bytes that the copies hold now."""
    copies = getattr(engine.module, COPIES_ATTRIBUTE)
    return sum(tensor.untyped_storage().nbytes() for tensor in copies._copies)


def test_the_same_completions_and_log_probabilities(
    engine: Engine, adapter: Any, as_packed: Any
) -> None:
    assert all(
        isinstance(layer.quant_method, DequantizedMethod)
        for layer in find_4bit_layers(engine.module)
    )
    assert draw(engine, adapter) == as_packed


def test_weights_are_unpacked_once_a_rollout(engine: Engine, adapter: Any, as_packed: Any) -> None:
    layers = find_4bit_layers(engine.module)
    parts = sum(len(layer.weight.bnb_quant_state) for layer in layers)
    for _ in range(2):
        engine.sleep()
        assert held(engine) == 0
        before = stand_in_4bit.calls["unpacked"]
        assert draw(engine, adapter) == as_packed
        assert stand_in_4bit.calls["unpacked"] - before == parts
        assert held(engine) == sum(copy_bytes(layer.weight, torch.float32) for layer in layers)


def test_a_call_of_the_llm_by_hand_fills_them(engine: Engine) -> None:
    from vllm import SamplingParams

    engine.sleep()
    told = engine.llm.generate(
        {"prompt_token_ids": PROMPTS[0]}, SamplingParams(max_tokens=3), use_tqdm=False
    )
    assert len(told[0].outputs[0].token_ids) == 3
    assert held(engine) > 0


def test_a_rollout_in_halves_uses_them(
    engine: Engine, adapter: Any, as_packed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, sizes = generation.generate, []

    def short_of_memory(llm: Any, prompts: Any, sampling: Any, *rest: Any) -> Any:
        sizes.append(len(prompts) * sampling.n)
        if sizes[-1] > 3:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return real(llm, prompts, sampling, *rest)

    monkeypatch.setattr(generation, "generate", short_of_memory)
    engine.sleep()
    # The tokens: log-probabilities are rounded otherwise in a smaller batch.
    assert draw(engine, adapter)[1] == as_packed[1]
    assert max(sizes[1:]) <= 3
    engine._max_completions_per_call = None


def test_too_little_memory_is_told_and_the_next_rollout_works(
    engine: Engine, adapter: Any, as_packed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = getattr(engine.module, COPIES_ATTRIBUTE)
    engine.sleep()

    def full() -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(copies, "_remap", full)
        with pytest.raises(ToolkitError, match="could not be dequantized") as caught:
            draw(engine, adapter)
    assert caught.value.fix
    assert held(engine) == 0
    assert draw(engine, adapter) == as_packed


# --- training over copies


def policy_over(engine: Engine, folder: Path) -> Any:
    """The trainer's model: the values that the engine's 4-bit layers stand for, and an adapter."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            packed, state = stand_in_4bit.pack(module.weight.data)
            stand_in_4bit.unpack(packed, state, module.weight.data)
    layers = ["q_proj", "v_proj", "up_proj"]
    torch.manual_seed(5)
    policy = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=layers))
    policy.toolkit_engine = engine
    return policy


def odd(completions: list[str], **_: Any) -> list[float]:
    words = [text.split() for text in completions]
    return [sum(int(word[1:]) % 2 for word in said) / max(1, len(said)) for said in words]


@contextmanager
def trainer_over(engine: Engine, model: Path, out: Path, **grpo: Any) -> Iterator[Any]:
    """A trainer whose copies are released in every reward call, which is after the rollout."""

    def reward(completions: list[str], **columns: Any) -> list[float]:
        assert held(engine) == 0
        return odd(completions, **columns)

    rows = [{"prompt": f"t{i} t{i + 1} t{i + 2}"} for i in range(5, 25)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' printer, and upstream's
        yield training.make_trainer(
            policy_over(engine, model),
            engine_checkpoints.tokenizer(),
            out,
            rows=rows,
            more={"reward_funcs": reward},
            max_steps=4,
            **grpo,
        )


def test_a_resumed_run_over_copies_ends_with_the_same_bytes(
    engine: Engine, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.print", lambda *a, **k: None)  # HF's PrinterCallback
    saving = {"save_strategy": "steps", "save_steps": 1}
    with trainer_over(engine, llama_folder, tmp_path / "a", **saving) as whole:
        whole.train()
    rows = training.steps(whole)
    assert len(rows) == 4
    assert max(row["sampling/logp_gap_max"] for row in rows) < 1e-4
    assert all(row["grad_norm"] > 0 for row in rows)
    with trainer_over(engine, llama_folder, tmp_path / "b") as again:
        again.train(str(tmp_path / "a" / "checkpoint-2"))
    assert training.adapter_bytes(again.model) == training.adapter_bytes(whole.model)
    assert training.steps(again) == rows


# --- too little memory


@pytest.mark.parametrize(("free", "said"), [(2 << 30, "no copies are made"), (80 << 30, None)])
def test_auto_without_a_sizer_says_what_it_leaves_out(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, free: int, said: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free, 80 << 30))
    config = engine.llm.llm_engine.vllm_config
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chosen = dequantized.choose_copy_bytes(engine.module, config)
    told = [str(one.message) for one in caught if one.category is ToolkitWarning]
    whole = sum(copy_bytes(layer.weight) for layer in find_4bit_layers(engine.module))
    assert chosen == (0 if said else whole)
    assert len(told) == (1 if said else 0)
    assert all(said in text and "leave only 0 B for the copies" in text for text in told if said)


def test_copies_that_are_asked_for_and_do_not_fit_are_refused(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = getattr(engine.module, COPIES_ATTRIBUTE)
    monkeypatch.setattr(type(copies), "_is_on_gpu", True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1 << 10, 80 << 30))
    with pytest.raises(ConfigError, match="16-bit copies") as caught:
        copies.check_fits()
    assert "1.0 KiB" in str(caught.value)
    assert caught.value.where == "model.dequantized_rollouts"


@pytest.mark.slow
def test_the_largest_layers_first(llama_folder: Path, adapter: Any, as_packed: Any) -> None:
    probe = {}
    with stand_in_4bit.open_packed(options(llama_folder), 200_000) as engine:
        for layer in find_4bit_layers(engine.module):
            taken = isinstance(layer.quant_method, DequantizedMethod)
            probe.setdefault(taken, []).append(copy_bytes(layer.weight))
        assert sum(probe[True]) <= 200_000
        assert min(probe[True]) >= max(probe[False])
        assert draw(engine, adapter) == as_packed
