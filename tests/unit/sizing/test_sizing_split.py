"""A model that is split over several cards: the part of each card, and the chosen number of
cards.
"""

import pytest

from toolkit.base.errors import ConfigError
from toolkit.config import parallel
from toolkit.sizing import solve
from toolkit.sizing.tensor_parallel import spec_of_one_card, split_facts

SEVEN_B = "Qwen/Qwen2.5-7B"
LARGE = {"hidden_size": 8192, "num_attention_heads": 64, "num_key_value_heads": 8}


def term_bytes(result, name):
    return next(line.nbytes for line in result.terms if line.name == name)


def find_linear(spec, leaf):
    return next(one for one in spec.blocks[0].linears if one.leaf == leaf)


def test_each_card_holds_rows_of_some_layers_and_columns_of_others(spec_of):
    spec = spec_of(SEVEN_B)
    card_spec = spec_of_one_card(spec, 2)
    assert (
        find_linear(card_spec, "q_proj").out_features
        == find_linear(spec, "q_proj").out_features // 2
    )
    assert (
        find_linear(card_spec, "down_proj").in_features
        == find_linear(spec, "down_proj").in_features // 2
    )
    assert find_linear(card_spec, "down_proj").out_features == spec.hidden_size
    assert card_spec.blocks[0].cache.key_elements == spec.blocks[0].cache.key_elements // 2
    assert spec_of_one_card(spec, 1) is spec


def test_several_cards_have_the_same_kv_head_if_there_are_too_few(spec_of):
    spec = spec_of("Qwen/Qwen2.5-1.5B-Instruct")  # 2 KV heads, 12 heads
    two, four = spec_of_one_card(spec, 2), spec_of_one_card(spec, 4)
    assert two.blocks[0].cache.key_elements == spec.head_dim
    assert four.blocks[0].cache.key_elements == spec.head_dim
    assert find_linear(four, "k_proj").out_features == spec.head_dim


def test_a_model_that_cannot_be_split_is_refused(spec_of, card, run):
    config = run(tensor_parallel_size=3)
    with pytest.raises(ConfigError, match="3 does not divide the model's 28 attention heads"):
        solve(config, spec_of(SEVEN_B), card("h100"), world_size=3)


def test_two_cards_hold_half_of_the_weights_each(spec_of, card, run):
    spec = spec_of(SEVEN_B)
    one_card = solve(run(checkpointing=True), spec, card("h100"))
    two_cards = solve(
        run(checkpointing=True, tensor_parallel_size=2), spec, card("h100"), world_size=2
    )
    assert term_bytes(two_cards, "engine.weights") == pytest.approx(
        term_bytes(one_card, "engine.weights") / 2, rel=0.01
    )
    assert term_bytes(two_cards, "engine.communication") > 0
    assert two_cards.model.parameters == one_card.model.parameters
    # Both cards have all of lora_A of q_proj, but only a part of lora_B. So a card has more than
    # half of the adapter, and less than all of it.
    assert term_bytes(one_card, "trainer.adapter") / 2 < term_bytes(two_cards, "trainer.adapter")
    assert term_bytes(two_cards, "trainer.adapter") < term_bytes(one_card, "trainer.adapter")
    assert any("tensor_parallel_size 2" in note for note in two_cards.model.notes)


def test_auto_is_the_smallest_number_that_fits(spec_of, card, run):
    spec = spec_of(SEVEN_B)
    config = run(tensor_parallel_size="auto", checkpointing=True)
    large = solve(config, spec, card("h100"), world_size=4)
    assert (large.feasible, large.choice.tensor_parallel_size) == (True, 1)
    small = solve(config, spec, card("4080"), world_size=4)  # 16 GB, of which the weights need 15.2
    assert (small.feasible, small.choice.tensor_parallel_size) == (True, 2)
    assert small.apply(config).model.tensor_parallel_size == 2


def test_a_run_that_does_not_fit_is_offered_more_cards(spec_of, card, run):
    result = solve(run(checkpointing=True), spec_of(SEVEN_B), card("4080"))
    (remedy,) = [one for one in result.remedies if "tensor_parallel_size" in one.change]
    assert remedy.world_size == 2
    assert remedy.enough
    assert remedy.change.startswith("2 cards")
    changed = run(checkpointing=True, **{k.partition(".")[2]: v for k, v in remedy.settings})
    assert solve(changed, spec_of(SEVEN_B), card("4080"), world_size=2).feasible


def split_remedies(result):
    return [one for one in result.remedies if "tensor_parallel_size" in one.change]


def test_the_cards_of_the_run_are_offered_before_more_cards(spec_of, card, run):
    """A 70B model on eight cards, without tensor_parallel_size in the run file: the remedy has the
    same generation batch on two groups of four cards.
    """
    spec, config = spec_of("meta-llama/Llama-3.3-70B-Instruct"), run(r=32)
    result = solve(config, spec, card("h100"), world_size=8)
    (remedy,) = split_remedies(result)
    assert "tensor_parallel_size 1 -> 4 on the 8 cards" in remedy.change
    assert remedy.enough
    assert remedy.world_size in (None, 1)
    settings = dict(remedy.settings)
    grpo = {k.partition(".")[2]: v for k, v in settings.items() if k.startswith("grpo.")}
    changed = run(grpo, r=32, tensor_parallel_size=4)
    fitting = solve(changed, spec, card("h100"), world_size=8)
    assert fitting.feasible
    before = result.choice.per_device_train_batch_size * result.choice.gradient_accumulation_steps
    after = fitting.choice.per_device_train_batch_size * fitting.choice.gradient_accumulation_steps
    assert after * 2 == before * 8


def test_a_number_that_is_too_small_is_offered_a_larger_one(spec_of, card, run):
    spec = spec_of("meta-llama/Llama-3.3-70B-Instruct")
    result = solve(run(r=64, tensor_parallel_size=2), spec, card("h100"), world_size=2)
    assert not result.feasible
    (remedy,) = split_remedies(result)
    assert remedy.change == "4 cards (--world-size 4) with tensor_parallel_size 4"
    assert not [one for one in result.remedies if "load_in_4bit" in one.change], (
        "rule TP003 refuses a split model with 4-bit weights"
    )


def test_4bit_weights_get_no_remedy_to_split_the_model(spec_of, card, run):
    spec = spec_of("meta-llama/Llama-3.3-70B-Instruct")
    result = solve(run(r=64, load_in_4bit=True), spec, card("4080"))
    assert not result.feasible
    assert not split_remedies(result)


def test_a_32b_model_is_split_if_one_card_is_too_small(spec_of, card, run):
    spec = spec_of("Qwen/Qwen2.5-32B")
    config = run(r=32, tensor_parallel_size="auto", checkpointing=True)
    result = solve(config, spec, card("a6000"), world_size=4)  # 48 GB, and the weights need 61
    assert (result.feasible, result.choice.tensor_parallel_size) == (True, 2)
    assert term_bytes(result, "engine.weights") == pytest.approx(32.76e9, rel=0.02)
    assert term_bytes(result, "engine.communication") > 0


def test_split_facts_agree_with_the_config(spec_of, all_shapes):
    config = all_shapes[SEVEN_B]["config"]
    for size in range(1, 9):
        problem = parallel.shape_problem(split_facts(spec_of(SEVEN_B)), size)
        assert problem == parallel.shape_problem(config, size), size


@pytest.mark.parametrize(
    ("size", "problem"),
    [
        (2, None),
        (8, None),
        (16, None),
        (12, "12 does not divide the model's 64 attention heads"),
        (5, "5 does not divide the model's 64 attention heads"),
    ],
)
def test_which_numbers_a_shape_can_be_split_by(size, problem):
    assert parallel.shape_problem(LARGE, size) == problem


@pytest.mark.parametrize(
    ("config", "size", "reason"),
    [
        ({"num_attention_heads": 12, "num_key_value_heads": 4}, 6, "KV heads"),
        ({"num_attention_heads": 8, "intermediate_size": 90}, 4, "intermediate_size 90"),
        ({"num_attention_heads": 8, "vocab_size": 50}, 8, "no part of the vocabulary"),
        ({"num_attention_heads": 9, "vocab_size": 100}, 9, "padded vocabulary 128"),
    ],
)
def test_the_reason_why_a_shape_cannot_be_split(config, size, reason):
    assert reason in parallel.shape_problem(config, size)


def test_possible_sizes_of_models_that_can_and_cannot_be_split():
    assert parallel.possible_sizes({"model_type": "phi3", "num_attention_heads": 8}, 4) == [1]
    assert parallel.possible_sizes({"model_type": "llama", "num_attention_heads": 8}, 6) == [1, 2]
    assert parallel.possible_sizes(None, 4) == [1, 2, 4]
    assert parallel.count_replicas(4, 2) == 2
    assert parallel.count_replicas(4, "auto") == 4


def test_a_model_is_split_over_the_fewest_cards_that_fit(spec_of, card, run):
    spec = spec_of("meta-llama/Llama-3.3-70B-Instruct")
    config = run(r=32, tensor_parallel_size="auto")
    result = solve(config, spec, card("h100"), world_size=8)
    chosen = result.choice.tensor_parallel_size
    assert result.feasible
    assert chosen > 1
    fewer = run(r=32, tensor_parallel_size=chosen // 2)
    assert not solve(fewer, spec, card("h100"), world_size=8).feasible
