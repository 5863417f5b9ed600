"""A micro-batch left to sizing: as large as the card allows, and always the whole generation
batch.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.base.errors import ConfigError
from toolkit.sizing import solve
from toolkit.sizing.micro_batch import MAX_CPU_TOKENS, divisors, read_batch

EIGHT_B, ONE_B = "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.2-1B-Instruct"
AUTO = {
    "per_device_train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
    "generation_batch_size": 64,
}


def micro_batch_and_accumulation(result):
    choice = result.choice
    return choice.per_device_train_batch_size, choice.gradient_accumulation_steps


def test_a_large_card_computes_the_whole_batch_in_one_pass(spec_of, card, run):
    short = {**AUTO, "max_prompt_length": 256, "max_completion_length": 256}
    result = solve(run(short), spec_of(ONE_B), card("h200"))
    assert result.choice.gradient_checkpointing is False
    assert result.feasible
    # One pass has 8 prompts once and 64 completions. Padded rows would have 32,768 tokens.
    assert result.choice.pack_tokens == 8 * 256 + 64 * 256
    assert (result.trainer.packs.passes, result.trainer.packs.padded_tokens) == (1, 32768)
    # If a model does not support packs, these rows have at most as many tokens.
    assert micro_batch_and_accumulation(result) == (32, 2)


def test_a_small_card_computes_the_batch_in_several_passes(spec_of, card, run):
    config = run({**AUTO, "generation_batch_size": 256}, checkpointing=True, max_num_seqs=32)
    small, large = (solve(config, spec_of(EIGHT_B), card(name)) for name in ("l40s", "h200"))
    assert large.choice.pack_tokens > small.choice.pack_tokens >= 1024
    for result in (small, large):
        assert (
            micro_batch_and_accumulation(result)[0] * micro_batch_and_accumulation(result)[1] == 256
        )
        assert result.engine.kv_bytes >= result.engine.kv_wanted_bytes


def test_twice_the_chosen_pack_size_does_not_fit(spec_of, card, run):
    """If the chosen pack size is set in the run file, the result is the same. With twice the pack
    size, the run does not fit, or the KV cache is smaller than the rollout needs.
    """
    many = {**AUTO, "generation_batch_size": 256}
    config = run(many, checkpointing=True, enable_sleep_mode=False, max_num_seqs=32)
    chosen = solve(config, spec_of(EIGHT_B), card("l40s"))
    micro, accumulation = micro_batch_and_accumulation(chosen)
    assert micro < 64

    def solve_with_pack_tokens(tokens):
        grpo = {**many, "per_device_train_batch_size": micro}
        grpo["gradient_accumulation_steps"] = accumulation
        values = {"checkpointing": True, "enable_sleep_mode": False, "max_num_seqs": 32}
        values["pack_tokens"] = tokens
        return solve(run(grpo, **values), spec_of(EIGHT_B), card("l40s"))

    same = solve_with_pack_tokens(chosen.choice.pack_tokens)
    assert same.interval == chosen.interval
    larger = solve_with_pack_tokens(2 * chosen.choice.pack_tokens)
    assert not larger.feasible or larger.engine.kv_bytes < larger.engine.kv_wanted_bytes


def test_checkpointing_is_off_if_the_batch_fits_without_it(spec_of, card, run):
    config = run({**AUTO, "generation_batch_size": 16}, padding_free=False, fused_kernels=False)
    assert solve(config, spec_of(ONE_B), card("h200")).choice.gradient_checkpointing is False
    tight = solve(config, spec_of(ONE_B), card("l4"))
    assert tight.choice.gradient_checkpointing is True
    # The gradient is the same. One pass with checkpointing needs a third more computation.
    assert micro_batch_and_accumulation(tight) == (16, 1)


def test_the_batch_is_divided_among_the_processes(spec_of, card, run):
    result = solve(run(AUTO), spec_of(ONE_B), card("h200"), world_size=4)
    assert micro_batch_and_accumulation(result) == (8, 2)
    assert result.choice.pack_tokens == 2 * 512 + 16 * 512
    with pytest.raises(ConfigError, match="cannot be divided evenly among 3"):
        solve(run(AUTO), spec_of(ONE_B), card("h200"), world_size=3)


def test_a_configured_utilization_limits_the_micro_batch(spec_of, card, run):
    """The trainer does not use the memory that gpu_memory_utilization gives to the engine. The
    sizer chooses a smaller micro-batch.
    """
    config = run(AUTO, checkpointing=True, enable_sleep_mode=False)
    unlimited = solve(config, spec_of(ONE_B), card("4090"))
    max_utilization = unlimited.interval.max
    limited = replace(
        config, model=replace(config.model, gpu_memory_utilization=max_utilization + 0.2)
    )
    result = solve(limited, spec_of(ONE_B), card("4090"))
    assert result.choice.pack_tokens < unlimited.choice.pack_tokens
    assert result.apply(limited).model.gpu_memory_utilization == max_utilization + 0.2


def test_apply_changes_only_the_batch_keys_of_grpo(spec_of, card, run):
    config = run(AUTO)
    filled = solve(config, spec_of(ONE_B), card("h200")).apply(config)
    changed = {key for key in filled.grpo if filled.grpo[key] != config.grpo[key]}
    assert changed == {"per_device_train_batch_size", "gradient_accumulation_steps"}
    assert filled.grpo["per_device_train_batch_size"] == 32
    assert filled.runtime.pack_tokens == 8 * 512 + 64 * 512


@pytest.mark.parametrize("available", [64 << 30, 1 << 40])
def test_on_the_cpu_the_micro_batch_does_not_depend_on_free_memory(
    monkeypatch, spec_of, run, available
):
    monkeypatch.setattr("toolkit.sizing.fit.available_host_bytes", lambda: available)
    result = solve(run(AUTO, engine="transformers"), spec_of(ONE_B), None)
    assert micro_batch_and_accumulation(result) == (32, 2)
    assert micro_batch_and_accumulation(result)[0] * 1024 == MAX_CPU_TOKENS


def test_on_the_cpu_too_little_memory_is_an_error(monkeypatch, spec_of, run):
    monkeypatch.setattr("toolkit.sizing.fit.available_host_bytes", lambda: 6 << 30)
    result = solve(run(AUTO, engine="transformers"), spec_of(ONE_B), None)
    assert not result.feasible
    assert micro_batch_and_accumulation(result) == (32, 2)
    changes = [remedy.change for remedy in result.remedies]
    assert "per_device_train_batch_size 32 -> 16 (gradient_accumulation_steps 2 -> 4)" in changes


@pytest.mark.parametrize(
    ("grpo", "where"),
    [
        ({"per_device_train_batch_size": "auto"}, "gradient_accumulation_steps"),
        ({"gradient_accumulation_steps": "auto"}, "per_device_train_batch_size"),
        ({**AUTO, "generation_batch_size": None}, "generation_batch_size"),
        ({**AUTO, "generation_batch_size": 0}, "generation_batch_size"),
        ({**AUTO, "generation_batch_size": True}, "generation_batch_size"),
    ],
)
def test_incomplete_auto_settings_are_an_error(spec_of, card, run, grpo, where):
    with pytest.raises(ConfigError) as caught:
        solve(run(grpo), spec_of(ONE_B), card("h100"))
    assert caught.value.where == f"grpo.{where}"


@given(st.integers(1, 5000), st.integers(1, 4), st.integers(1, 5000), st.booleans())
@settings(max_examples=200, deadline=None)
def test_every_micro_batch_divides_the_generation_batch(own_completions, world, sequence, on_cpu):
    """micro-batch x accumulation x processes is always the generation batch."""
    grpo = {**AUTO, "generation_batch_size": own_completions * world}
    micros, accumulation, rollouts = read_batch(grpo, sequence, on_cpu=on_cpu, world_size=world)
    assert rollouts == own_completions
    assert micros[0] * accumulation == own_completions
    assert all(own_completions % micro == 0 for micro in micros)
    assert list(micros) == sorted(set(micros), reverse=True)
    if on_cpu:
        assert len(micros) == 1
        assert micros[0] == 1 or micros[0] * sequence <= MAX_CPU_TOKENS
    else:
        assert (
            micros
            == tuple(n for n in range(own_completions, 0, -1) if own_completions % n == 0)
            == divisors(own_completions)
        )
