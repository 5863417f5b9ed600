"""The interval of gpu_memory_utilization: its ends, the choice inside it, and the error if it is
empty.
"""

from dataclasses import replace

import pytest

from toolkit.base.errors import ConfigError
from toolkit.base.formatting import GIB
from toolkit.sizing import solve
from toolkit.sizing.terms import total_bytes

EIGHT_B, ONE_B = "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.2-1B-Instruct"
PADDED = {"padding_free": False, "fused_kernels": False}  # a step needs more memory


def term_bytes(result, name):
    return next(line.nbytes for line in result.terms if line.name == name)


def test_both_phases_fit_at_the_choice(spec_of, card, run):
    """Each phase fits in the free memory. The larger phase uses at least 92 % of it."""
    result = solve(run(r=64), spec_of(EIGHT_B), card("h100"))
    free = result.device["free_bytes"]
    for phase in ("rollout", "training"):
        assert total_bytes(result.terms, "always", phase) <= free
    used = max(total_bytes(result.terms, "always", phase) for phase in ("rollout", "training"))
    assert used >= 0.92 * free
    assert result.interval.min <= result.choice.gpu_memory_utilization <= result.interval.max


def test_the_lower_end_holds_one_sequence(spec_of, card, run):
    result = solve(run(r=64, gpu_memory_utilization=0.3), spec_of(EIGHT_B), card("h100"))
    engine = sum(
        line.nbytes
        for line in result.terms
        if line.name.startswith("engine.") and line.name != "engine.kv"
    )
    least = engine + term_bytes(result, "margin.engine") + 1024 * 131072  # KV cache of 1024 tokens
    assert result.interval.min == pytest.approx(least / result.device["cuda_total_bytes"], abs=2e-3)
    assert "engine.weights" in result.interval.binding_min


def test_memory_in_use_lowers_only_the_upper_end(spec_of, card, run):
    free_card = card("h100")
    used_card = replace(free_card, free_bytes=free_card.free_bytes - 20 * GIB)
    before = solve(run(r=64, checkpointing=True), spec_of(EIGHT_B), free_card).interval
    after = solve(run(r=64, checkpointing=True), spec_of(EIGHT_B), used_card).interval
    assert after.min == before.min
    taken = 20 * GIB / free_card.cuda_total_bytes
    assert before.max - after.max == pytest.approx(taken, abs=2e-3)


def test_sharing_saves_one_copy_of_the_weights(spec_of, card, run):
    shared_weights = solve(run(checkpointing=True), spec_of(EIGHT_B), card("h100"))
    separate_weights = solve(
        run(checkpointing=True, share_weights=False), spec_of(EIGHT_B), card("h100")
    )
    copy = term_bytes(separate_weights, "trainer.weights")
    assert copy == pytest.approx(8030261248 * 2, rel=1e-3)
    assert not [line for line in shared_weights.terms if line.name == "trainer.weights"]
    assert shared_weights.interval.max - separate_weights.interval.max == pytest.approx(
        copy / shared_weights.device["cuda_total_bytes"], abs=2e-3
    )


def test_sleep_frees_the_cache_for_the_step(spec_of, card, run):
    """If the engine sleeps during a training step, the step does not limit gpu_memory_utilization,
    because the two phases do not need memory at the same time.
    """
    values = {"checkpointing": True, "max_seq_length": 4096, **PADDED}
    grpo = {"max_completion_length": 2048, "max_prompt_length": 2048}
    awake = solve(run(grpo, enable_sleep_mode=False, **values), spec_of(EIGHT_B), card("h100"))
    asleep = solve(run(grpo, enable_sleep_mode=True, **values), spec_of(EIGHT_B), card("h100"))
    assert asleep.interval.max > awake.interval.max + 0.1
    assert "rollout phase" in asleep.interval.binding_max
    assert "training step" in awake.interval.binding_max


def test_sleep_is_chosen_if_the_run_does_not_fit_without_it(spec_of, card, run):
    grpo = {"max_completion_length": 1024, "max_prompt_length": 1024, "num_generations": 8}
    values = {"max_seq_length": 2048, "load_in_4bit": True, "r": 64, "checkpointing": True}
    config = run(grpo, **values, **PADDED)
    fits = solve(config, spec_of(EIGHT_B), card("h100"))
    assert fits.choice.enable_sleep_mode is False
    tight = replace(card("4090"), free_bytes=19 * GIB)
    result = solve(config, spec_of(EIGHT_B), tight)
    assert result.feasible
    assert result.choice.enable_sleep_mode is True


def test_checkpointing_is_chosen_by_memory(spec_of, card, run):
    config = run({"per_device_train_batch_size": 16}, checkpointing="auto", **PADDED)
    assert solve(config, spec_of(ONE_B), card("h200")).choice.gradient_checkpointing is False
    assert solve(config, spec_of(ONE_B), card("4090")).choice.gradient_checkpointing is True


@pytest.mark.parametrize(
    ("rank", "legal"),
    [(1, 1), (2, 8), (8, 8), (9, 16), (64, 64), (65, 128), (257, 320), (321, 512)],
)
def test_the_smallest_legal_rank(spec_of, card, run, rank, legal):
    result = solve(run(r=rank), spec_of(ONE_B), card("h100"))
    assert result.choice.max_lora_rank == legal
    prices = dict(result.engine.ranks)
    assert list(prices) == [1, 8, 16, 32, 64, 128, 256, 320, 512]
    assert prices[legal] == term_bytes(result, "engine.lora")
    assert prices[512] == 512 * prices[1]


def test_a_rank_above_the_largest_legal_rank_is_refused(spec_of, card, run):
    with pytest.raises(ConfigError, match="512"):
        solve(run(r=513), spec_of(ONE_B), card("h100"))
    assert solve(run(r=513, engine="transformers"), spec_of(ONE_B), card("h100")).feasible


def test_a_cache_that_is_too_small_for_one_sequence_is_refused(spec_of, card, run):
    with pytest.raises(
        ConfigError, match=r"too small: \d+ bytes are needed for one sequence of \d+ tokens"
    ):
        solve(run(kv_cache_bytes=1 << 16), spec_of(ONE_B), card("h100"))
    assert solve(run(kv_cache_bytes=1 << 30), spec_of(ONE_B), card("h100")).feasible
    free = run(kv_cache_bytes=1 << 16, engine="transformers")
    assert solve(free, spec_of(ONE_B), card("h100")).feasible


def test_each_remedy_of_an_infeasible_run_frees_what_it_states(spec_of, card, run):
    """After a remedy is applied, the missing memory is smaller by the bytes that the remedy
    states.
    """
    config = run(
        {
            "per_device_train_batch_size": 8,
            "max_completion_length": 2048,
            "max_prompt_length": 2048,
        },
        max_seq_length=4096,
        r=64,
    )
    result = solve(config, spec_of(EIGHT_B), card("4090"))
    assert not result.feasible
    assert result.short_bytes > GIB
    by_change = {remedy.change: remedy for remedy in result.remedies}
    four_bit = by_change["load_in_4bit: true"]
    changed = replace(config, model=replace(config.model, load_in_4bit=True))
    still_missing = solve(changed, spec_of(EIGHT_B), card("4090")).short_bytes
    assert four_bit.frees_bytes == result.short_bytes - still_missing
    shorter = next(change for change in by_change if change.startswith("max_completion_length"))
    assert shorter.startswith("max_completion_length 2048 -> 1024")
    with pytest.raises(ConfigError) as caught:
        result.apply(config)
    text = str(caught.value)
    assert "are missing" in text
    assert "max_completion_length 2048 -> 1024" in text
    assert "frees" in text
    assert caught.value.exit_code == 1


def test_a_remedy_that_is_enough_is_first(spec_of, card, run):
    config = run(
        {"max_completion_length": 2048, "max_prompt_length": 2048},
        max_seq_length=4096, r=64, load_in_4bit=True, **PADDED,
    )  # fmt: skip
    first = solve(config, spec_of(EIGHT_B), card("4090")).remedies[0]
    assert first.enough
    assert str(first).endswith("(enough)")


def test_apply_replaces_every_auto(spec_of, card, run):
    config = run(r=12, checkpointing="auto")
    filled = solve(config, spec_of(ONE_B), card("h100")).apply(config)
    assert filled.model.max_lora_rank == 16
    assert filled.model.max_num_seqs == 8
    assert filled.model.dtype == "bfloat16"
    assert filled.model.fast_inference is True
    assert isinstance(filled.model.gpu_memory_utilization, float)
    assert filled.lora.use_gradient_checkpointing in (True, False)
    assert "auto" not in [
        getattr(filled.model, name) for name in ("max_num_batched_tokens", "enable_sleep_mode")
    ]


def test_configured_values_are_kept(spec_of, card, run):
    config = run(gpu_memory_utilization=0.5, max_lora_rank=64, max_num_seqs=3, dtype="float16")
    filled = solve(config, spec_of(ONE_B), card("h100")).apply(config)
    model = filled.model
    assert (model.gpu_memory_utilization, model.max_lora_rank) == (0.5, 64)
    assert (model.max_num_seqs, model.dtype) == (3, "float16")


@pytest.mark.parametrize(("written", "word"), [(0.05, "below"), (0.99, "above")])
def test_a_utilization_outside_the_interval_is_refused(spec_of, card, run, written, word):
    config = run(gpu_memory_utilization=written, r=64)
    with pytest.raises(ConfigError, match=word):
        solve(config, spec_of(EIGHT_B), card("h100")).apply(config)
