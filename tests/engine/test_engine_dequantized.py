"""Rollouts of 4-bit layers with 16-bit copies: the completions are the same, the memory of the
copies is released between rollouts, and a rollout may be split. tests/gpu covers bitsandbytes and
CUDA graphs.
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
from conftest import small_options
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
    """A model with an adapter that changes the completions."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model


def publish_and_sample(engine: Engine, adapter: Any) -> Any:
    engine.publish(adapter)
    return engine.generate(PROMPTS, SAMPLING, seed=3).as_tuple()


@pytest.fixture(scope="module")
def packed_completions(llama_folder: Path, adapter: Any) -> Any:
    """The engine's completions when every matrix product dequantizes its weight."""
    with stand_in_4bit.open_packed_engine(small_options(llama_folder), False) as engine:
        assert getattr(engine.module, COPIES_ATTRIBUTE, None) is None
        return publish_and_sample(engine, adapter)


@pytest.fixture(scope="module")
def engine(llama_folder: Path, packed_completions: Any) -> Iterator[Engine]:
    """A second engine in this process, with copies of all layers."""
    del packed_completions
    with stand_in_4bit.open_packed_engine(small_options(llama_folder), True) as opened:
        yield opened


def copied_bytes(engine: Engine) -> int:
    """Bytes that the copies hold now."""
    copies = getattr(engine.module, COPIES_ATTRIBUTE)
    return sum(tensor.untyped_storage().nbytes() for tensor in copies._copies)


def test_copies_give_the_same_completions_and_logprobs(
    engine: Engine, adapter: Any, packed_completions: Any
) -> None:
    assert all(
        isinstance(layer.quant_method, DequantizedMethod)
        for layer in find_4bit_layers(engine.module)
    )
    assert publish_and_sample(engine, adapter) == packed_completions


def test_weights_are_unpacked_once_per_rollout(
    engine: Engine, adapter: Any, packed_completions: Any
) -> None:
    layers = find_4bit_layers(engine.module)
    parts = sum(len(layer.weight.bnb_quant_state) for layer in layers)
    for _ in range(2):
        engine.sleep()
        assert copied_bytes(engine) == 0
        before = stand_in_4bit.calls["unpacked"]
        assert publish_and_sample(engine, adapter) == packed_completions
        assert stand_in_4bit.calls["unpacked"] - before == parts
        assert copied_bytes(engine) == sum(
            copy_bytes(layer.weight, torch.float32) for layer in layers
        )


def test_calling_the_llm_directly_fills_the_copies(engine: Engine) -> None:
    from vllm import SamplingParams

    engine.sleep()
    outputs = engine.llm.generate(
        {"prompt_token_ids": PROMPTS[0]}, SamplingParams(max_tokens=3), use_tqdm=False
    )
    assert len(outputs[0].outputs[0].token_ids) == 3
    assert copied_bytes(engine) > 0


def test_a_split_rollout_uses_the_copies(
    engine: Engine, adapter: Any, packed_completions: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, sizes = generation.generate, []

    def run_out_of_memory(llm: Any, prompts: Any, sampling: Any, *rest: Any) -> Any:
        sizes.append(len(prompts) * sampling.n)
        if sizes[-1] > 3:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return real(llm, prompts, sampling, *rest)

    monkeypatch.setattr(generation, "generate", run_out_of_memory)
    engine.sleep()
    # Only the tokens are compared: a smaller batch rounds log-probabilities differently.
    assert publish_and_sample(engine, adapter)[1] == packed_completions[1]
    assert max(sizes[1:]) <= 3
    engine._max_completions_per_call = None


def test_too_little_memory_is_an_error_and_the_next_rollout_works(
    engine: Engine, adapter: Any, packed_completions: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = getattr(engine.module, COPIES_ATTRIBUTE)
    engine.sleep()

    def raise_out_of_memory() -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(copies, "_remap", raise_out_of_memory)
        with pytest.raises(ToolkitError, match="could not be dequantized") as caught:
            publish_and_sample(engine, adapter)
    assert caught.value.fix
    assert copied_bytes(engine) == 0
    assert publish_and_sample(engine, adapter) == packed_completions


# --- training with copies


def make_policy(engine: Engine, folder: Path) -> Any:
    """The trainer's model: the dequantized values of the engine's 4-bit layers, and an adapter."""
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


def odd_number_reward(completions: list[str], **_: Any) -> list[float]:
    words = [text.split() for text in completions]
    return [
        sum(int(word[1:]) % 2 for word in completion_words) / max(1, len(completion_words))
        for completion_words in words
    ]


@contextmanager
def make_trainer_with_copies(engine: Engine, model: Path, out: Path, **grpo: Any) -> Iterator[Any]:
    """A trainer whose reward function checks that the copies are released after the rollout."""

    def reward(completions: list[str], **columns: Any) -> list[float]:
        assert copied_bytes(engine) == 0
        return odd_number_reward(completions, **columns)

    rows = [{"prompt": f"t{i} t{i + 1} t{i + 2}"} for i in range(5, 25)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of transformers and vLLM
        yield training.make_trainer(
            make_policy(engine, model),
            engine_checkpoints.make_tokenizer(),
            out,
            rows=rows,
            trainer_arguments={"reward_funcs": reward},
            max_steps=4,
            **grpo,
        )


def test_a_resumed_run_with_copies_gives_the_same_adapter(
    engine: Engine, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.print", lambda *a, **k: None)  # HF's PrinterCallback
    saving = {"save_strategy": "steps", "save_steps": 1}
    with make_trainer_with_copies(engine, llama_folder, tmp_path / "a", **saving) as full_run:
        full_run.train()
    rows = training.logged_steps(full_run)
    assert len(rows) == 4
    assert max(row["sampling/logp_gap_max"] for row in rows) < 1e-4
    assert all(row["grad_norm"] > 0 for row in rows)
    with make_trainer_with_copies(engine, llama_folder, tmp_path / "b") as resumed_run:
        resumed_run.train(str(tmp_path / "a" / "checkpoint-2"))
    assert training.adapter_checksum(resumed_run.model) == training.adapter_checksum(full_run.model)
    assert training.logged_steps(resumed_run) == rows


# --- too little memory


@pytest.mark.parametrize(
    ("free_bytes", "message"), [(2 << 30, "no copies are made"), (80 << 30, None)]
)
def test_auto_without_an_estimate_warns_about_missing_copies(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, free_bytes: int, message: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free_bytes, 80 << 30))
    config = engine.llm.llm_engine.vllm_config
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        copy_budget_bytes = dequantized.choose_copy_bytes(engine.module, config)
    warnings_seen = [
        str(warning.message) for warning in caught if warning.category is ToolkitWarning
    ]
    all_copies_bytes = sum(copy_bytes(layer.weight) for layer in find_4bit_layers(engine.module))
    assert copy_budget_bytes == (0 if message else all_copies_bytes)
    assert len(warnings_seen) == (1 if message else 0)
    assert all(
        message in text and "leave only 0 B for the copies" in text
        for text in warnings_seen
        if message
    )


def test_requested_copies_that_do_not_fit_are_refused(
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
def test_the_largest_layers_are_copied_first(
    llama_folder: Path, adapter: Any, packed_completions: Any
) -> None:
    bytes_by_copied = {}
    with stand_in_4bit.open_packed_engine(small_options(llama_folder), 200_000) as engine:
        for layer in find_4bit_layers(engine.module):
            is_copied = isinstance(layer.quant_method, DequantizedMethod)
            bytes_by_copied.setdefault(is_copied, []).append(copy_bytes(layer.weight))
        assert sum(bytes_by_copied[True]) <= 200_000
        assert min(bytes_by_copied[True]) >= max(bytes_by_copied[False])
        assert publish_and_sample(engine, adapter) == packed_completions
