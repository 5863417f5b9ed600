"""Training on packs: the memory of a pass computed by hand, the budget of tokens per pack, and
sequences that are too long.
"""

from __future__ import annotations

import json

import pytest

from toolkit.base.errors import ConfigError
from toolkit.cli.size_report import format_report
from toolkit.sizing import solve
from toolkit.sizing.packs import uses_packs

EIGHT_B, ONE_B = "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.2-1B-Instruct"
AUTO = {"per_device_train_batch_size": "auto", "gradient_accumulation_steps": "auto"}
LONG = {
    **AUTO, "generation_batch_size": 8, "max_prompt_length": 16384, "max_completion_length": 2048,
}  # fmt: skip
CONTEXT = {"max_seq_length": 18432, "load_in_4bit": True, "r": 32, "checkpointing": True}


def find_term(result, name):
    return next(one for one in result.terms if one.name == name)


def test_a_group_of_long_sequences_shares_its_prompt(spec_of, card, run, monkeypatch):
    """A pack has 16,384 + 8 x 2,048 tokens. Eight padded rows have 147,456."""
    monkeypatch.setenv("COLUMNS", "100")
    result = solve(run(LONG, **CONTEXT), spec_of(EIGHT_B), card("h100"))
    packs = result.trainer.packs
    assert (packs.pack_tokens, packs.step_tokens, packs.passes) == (32768, 32768, 1)
    assert packs.padded_tokens == 147456
    assert result.choice.per_device_train_batch_size == 1  # for a model that does not support packs
    rows = solve(run(LONG, **CONTEXT, padding_free=False), spec_of(EIGHT_B), card("h100"))
    assert rows.trainer.packs is None
    assert result.trainer.step_s_estimate < 0.5 * rows.trainer.step_s_estimate
    text = " ".join(format_report(result, run(LONG, **CONTEXT)).split())
    assert "runtime.pack_tokens 32,768 chosen" in text
    assert "training passes of a step 1 at full length, 1 at half 32,768 tokens, padded" in text


def test_activations_of_a_pass_computed_by_hand(spec_of, card, run):
    """An 8B model with checkpointing saves a hidden state for each token and layer, and the tensors
    of one layer. In that layer each completion has a copy of the keys of its prompt.
    """
    values = {**CONTEXT, "load_in_4bit": False, "fused_kernels": True, "r": 16}
    result = solve(run(LONG, **values), spec_of(EIGHT_B), card("h200"))
    tokens, keys = 32768, 32768 + 8 * 16384
    hidden, inner, kv, query, r = 4096, 14336, 1024, 4096, 16
    checkpoints = 32 * tokens * hidden * 2
    norms = 2 * (2 * hidden + 4)
    # The inputs of q, k, v; of gate, up; of down; and of each lora_B.
    inputs = 2 * (hidden + hidden + inner) + 2 * 7 * r
    attention = 2 * (query + query) + 4 * 32
    layer = tokens * (norms + inputs + attention + 2 * 2 * inner) + keys * 2 * (kv + kv)
    temporary = tokens * (2 * inner + 4 * hidden)
    activations = find_term(result, "trainer.activations")
    assert activations.nbytes == checkpoints + layer + temporary
    assert (
        "packs of 32,768 tokens that read 163,840 keys, checkpointing, fused" in activations.source
    )


def test_fused_kernels_save_memory(spec_of, card, run):
    sizes = [
        solve(
            run(LONG, **CONTEXT, fused_kernels=fused, pack_tokens=20000), spec_of(EIGHT_B),
            card("h200"),
        ).trainer.step_bytes
        for fused in ("auto", False)
    ]  # fmt: skip
    assert sizes[0] < 0.92 * sizes[1]


def test_a_small_card_needs_more_passes(spec_of, card, run):
    grpo = {**AUTO, "generation_batch_size": 256}
    small, large = (
        solve(
            run(grpo, checkpointing=True, max_num_seqs=32), spec_of(EIGHT_B), card(name)
        ).trainer.packs
        for name in ("l40s", "h200")
    )
    assert large.passes < small.passes
    assert 1024 <= small.pack_tokens < large.pack_tokens
    assert small.passes_half <= small.passes


def test_a_configured_budget_is_used_and_fits_one_sequence(spec_of, card, run):
    grpo = {**AUTO, "generation_batch_size": 64}
    configured = solve(run(grpo, pack_tokens=5000), spec_of(ONE_B), card("h200"))
    assert configured.choice.pack_tokens == 5000
    too_small = solve(run(grpo, pack_tokens=10), spec_of(ONE_B), card("h200"))
    assert too_small.choice.pack_tokens == 1024
    assert too_small.trainer.packs.passes == 64
    rows = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 16}
    by_rows = solve(run(rows), spec_of(ONE_B), card("h200"))
    assert by_rows.choice.pack_tokens is None  # the size follows from the rows: 4 x 1024 tokens
    assert by_rows.trainer.packs.pack_tokens == 4096


@pytest.mark.parametrize("available", [64 << 30, 1 << 40])
def test_on_the_cpu_the_budget_does_not_depend_on_free_memory(monkeypatch, spec_of, run, available):
    monkeypatch.setattr("toolkit.sizing.fit.available_host_bytes", lambda: available)
    grpo = {**AUTO, "generation_batch_size": 64}
    result = solve(run(grpo, engine="transformers"), spec_of(ONE_B), None)
    assert result.choice.pack_tokens == 32768


def test_the_error_for_a_sequence_that_does_not_fit_names_the_longest_that_fits(spec_of, card, run):
    config = run(LONG, **{**CONTEXT, "load_in_4bit": False})
    result = solve(config, spec_of(EIGHT_B), card("4090"))
    longest = result.longest_sequence
    assert not result.feasible
    assert 0 < longest < 18432
    with pytest.raises(ConfigError, match=f"a sequence of {longest:,} tokens"):
        result.apply(config)
    assert json.loads(json.dumps(result.to_json()))["longest_sequence"] == longest
    prompt = longest // 2
    shorter = {
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8,
        "max_prompt_length": prompt, "max_completion_length": min(2048, longest - prompt),
    }  # fmt: skip
    values = {**CONTEXT, "load_in_4bit": False, "max_seq_length": longest}
    assert solve(run(shorter, **values), spec_of(EIGHT_B), card("4090")).feasible


def test_the_error_says_if_not_even_a_short_sequence_fits(spec_of, card, run):
    result = solve(run(LONG, **{**CONTEXT, "load_in_4bit": False}), spec_of(EIGHT_B), card("t4"))
    assert result.longest_sequence == 0
    assert "not even a short sequence" in result.infeasible_error().message


@pytest.mark.parametrize(
    ("grpo", "values", "model"),
    [
        ({"loss_type": "bnpo"}, {}, ONE_B),
        ({}, {"padding_free": False}, ONE_B),
        ({}, {"attn_implementation": "flash_attention_2"}, ONE_B),
        ({}, {}, "Qwen/Qwen3-30B-A3B"),
        ({}, {}, "Qwen/Qwen3-Next-80B-A3B-Thinking"),
        ({}, {}, "deepseek-ai/DeepSeek-V3"),
    ],
)
def test_runs_that_do_not_use_packs(spec_of, run, grpo, values, model):
    assert uses_packs(run(), spec_of(ONE_B))
    assert not uses_packs(run(grpo, **values), spec_of(model))


def test_a_group_can_be_split_over_several_processes(spec_of, card, run):
    """Each of 3 processes has 8 rows, and a group has 12. So a group can begin anywhere in the rows
    of a process, and a pass can have two prompts.
    """
    grpo = {**AUTO, "generation_batch_size": 24, "num_generations": 12}
    result = solve(run(grpo), spec_of(ONE_B), card("h200"), world_size=3)
    assert result.choice.pack_tokens == 2 * 512 + 8 * 512
    assert result.trainer.packs.passes == 1
