"""16-bit copies of 4-bit weights during a rollout: their size, and when the sizer chooses them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from toolkit.base.formatting import GIB
from toolkit.cli.size_report import format_report
from toolkit.sizing.dequantized import TERM
from toolkit.sizing.solve import best_candidate, solve

EIGHT_B, ONE_B = "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.2-1B-Instruct"
LAYER_PARAMETERS = 32 * (4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336)
GRPO = {
    "generation_batch_size": 64,
    "per_device_train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
}


def term_bytes(result, name=TERM):
    return sum(one.nbytes for one in result.terms if one.name == name)


def test_a_large_card_has_memory_for_all_copies(spec_of, card, run):
    config = run(GRPO, load_in_4bit=True)
    result = solve(config, spec_of(EIGHT_B), card("h100"))
    assert result.choice.dequantized_rollouts is True
    assert term_bytes(result) == 2 * LAYER_PARAMETERS
    assert next(one.phase for one in result.terms if one.name == TERM) == "rollout"
    assert result.engine.kv_bytes >= result.engine.kv_wanted_bytes
    assert result.apply(config).model.dequantized_rollouts is True
    assert "dequantized_rollouts" in format_report(result, config)


def test_a_smaller_card_has_memory_for_some_copies_or_none(spec_of, card, run):
    spec, config = spec_of(EIGHT_B), run(GRPO, load_in_4bit=True)
    free = replace(card("l40s"), free_bytes=22 * GIB)
    some = solve(config, spec, free)
    assert type(some.choice.dequantized_rollouts) is int
    assert 0 < term_bytes(some) == some.choice.dequantized_rollouts < 2 * LAYER_PARAMETERS
    assert some.engine.kv_bytes >= some.engine.kv_wanted_bytes
    none = solve(config, spec, replace(free, free_bytes=14 * GIB))
    assert none.feasible
    assert none.choice.dequantized_rollouts is False
    assert term_bytes(none) == 0
    assert none.engine.copies_note in none.model.notes
    assert "no copies are made" in none.engine.copies_note
    assert "no copies are made" in format_report(none, config).replace("\n      ", " ")


def test_copies_do_not_reduce_the_memory_of_a_training_step(spec_of, card, run):
    """The copies are freed before a training step, so the micro-batch is the same with copies and
    without them.
    """
    spec = spec_of(EIGHT_B)
    with_, without = (
        solve(run(GRPO, load_in_4bit=True, dequantized_rollouts=on), spec, card("h100"))
        for on in (True, False)
    )
    assert with_.choice.per_device_train_batch_size == without.choice.per_device_train_batch_size
    assert with_.peaks.rollout_bytes - with_.engine.kv_bytes == pytest.approx(
        without.peaks.rollout_bytes - without.engine.kv_bytes + 2 * LAYER_PARAMETERS
    )
    assert term_bytes(without) == 0


def test_a_configured_size_is_used_or_refused_with_a_remedy(spec_of, card, run):
    spec = spec_of(EIGHT_B)
    some = solve(run(GRPO, load_in_4bit=True, dequantized_rollouts=2 * GIB), spec, card("h100"))
    assert term_bytes(some) == some.choice.dequantized_rollouts == 2 * GIB
    tight = replace(card("l40s"), free_bytes=18 * GIB)
    forced = solve(run(GRPO, load_in_4bit=True, dequantized_rollouts=True), spec, tight)
    assert not forced.feasible
    assert any(
        dict(remedy.settings) == {"model.dequantized_rollouts": False} and remedy.enough
        for remedy in forced.remedies
    )


def test_16_bit_weights_and_other_engines_have_no_copies(spec_of, card, run):
    for values in (
        {},
        {"load_in_4bit": True, "engine": "transformers"},
        {"load_in_4bit": True, "tensor_parallel_size": 2, "share_weights": False},
    ):
        result = solve(
            run(GRPO, dequantized_rollouts=True, **values), spec_of(EIGHT_B), card("h200")
        )
        assert term_bytes(result) == 0
        assert result.choice.dequantized_rollouts is False


def test_a_configured_utilization_limits_the_copies(spec_of, card, run):
    config = run(GRPO, load_in_4bit=True, gpu_memory_utilization=0.3)
    case, fit = best_candidate(config, spec_of(EIGHT_B), card("h100"), 1)
    taken = int(0.3 * card("h100").cuda_total_bytes)
    assert 0 < case.plan.copies_bytes < 2 * LAYER_PARAMETERS
    assert fit.min_bytes - fit.kv_sequence_bytes + fit.kv_wanted_bytes <= taken
