"""Hugging Face generation as a RolloutEngine: rollouts have TRL's layout, and generating leaves the
model and the random state unchanged.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from toolkit.base.errors import ConfigTypeError, ConfigValueError, UnsupportedError
from toolkit.engine.hf_engine import TransformersEngine
from toolkit.engine.rollout_engine import RolloutEngine
from toolkit.engine.rollout_request import Sampling

PROMPTS = [[4, 5, 6], [7]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    sys.path.append(str(Path(__file__).resolve().parents[2] / "fixtures"))
    from tiny_llama import make_tiny
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(make_tiny(tmp_path_factory.mktemp("m") / "tiny"))


@pytest.fixture
def engine(model: Any) -> TransformersEngine:
    return TransformersEngine(model, pad_id=0, end_ids=[2])


def test_it_implements_the_rollout_engine_interface(engine: TransformersEngine, model: Any) -> None:
    assert isinstance(engine, RolloutEngine)
    engine.publish(model)
    engine.sleep()
    engine.wake()
    engine.close()
    with pytest.raises(ConfigValueError, match="does not sample from"):
        engine.publish(object())


def test_the_rollout_has_the_layout_of_trl(engine: TransformersEngine) -> None:
    rollout = engine.generate(PROMPTS, Sampling(n=2, max_tokens=4), seed=0)
    assert rollout.prompt_ids == [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    assert len(rollout.completion_ids) == 4
    assert rollout.logprobs is not None
    assert rollout.logprob_token_ids is not None
    for ids, values, tokens in zip(
        rollout.completion_ids, rollout.logprobs, rollout.logprob_token_ids, strict=True
    ):
        assert tokens == [[token] for token in ids]
        assert len(values) == len(ids)


def test_log_probabilities_are_ordered_from_the_most_likely_token(
    engine: TransformersEngine,
) -> None:
    rollout = engine.generate(PROMPTS, Sampling(max_tokens=6, logprobs=3), seed=0)
    assert rollout.logprobs is not None
    assert rollout.logprob_token_ids is not None
    for ids, values, tokens in zip(
        rollout.completion_ids, rollout.logprobs, rollout.logprob_token_ids, strict=True
    ):
        for token, ranked, names in zip(ids, values, tokens, strict=True):
            assert token in names
            assert ranked == sorted(ranked, reverse=True)
            assert len(names) == len(set(names)) in (3, 4)


def test_there_are_no_log_probabilities_unless_requested(engine: TransformersEngine) -> None:
    rollout = engine.generate(PROMPTS, Sampling(max_tokens=2, logprobs=None), seed=0)
    assert rollout.logprobs is rollout.logprob_token_ids is None
    assert engine.generate([], Sampling(), seed=0).completion_ids == []


def test_the_generation_config_of_the_checkpoint_is_ignored(model: Any) -> None:
    """The temperature or top_k of a checkpoint must not change the requested sampling."""
    engine = TransformersEngine(model, pad_id=0, end_ids=[2])
    expected = engine.generate(PROMPTS, Sampling(max_tokens=8), seed=3)
    original = model.generation_config
    try:
        model.generation_config = type(original)(
            temperature=0.1,
            top_k=1,
            top_p=0.1,
            do_sample=True,
            repetition_penalty=3.0,
            eos_token_id=2,
        )
        assert engine.generate(PROMPTS, Sampling(max_tokens=8), seed=3) == expected
    finally:
        model.generation_config = original


def test_training_mode_and_random_state_are_restored(
    engine: TransformersEngine, model: Any
) -> None:
    model.train()
    state = torch.get_rng_state()
    engine.generate(PROMPTS, Sampling(max_tokens=2), seed=0)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    model.eval()


def test_min_p_and_top_k_restrict_the_sampled_tokens(engine: TransformersEngine) -> None:
    greedy = engine.generate(PROMPTS, Sampling(max_tokens=8, temperature=0), seed=0)
    for narrow in (Sampling(max_tokens=8, top_k=1), Sampling(max_tokens=8, min_p=1.0)):
        assert engine.generate(PROMPTS, narrow, seed=1).completion_ids == greedy.completion_ids


def test_unsupported_options_raise_errors(engine: TransformersEngine) -> None:
    with pytest.raises(UnsupportedError, match="structured outputs need the vLLM engine"):
        engine.generate(PROMPTS, Sampling(structured_outputs_regex="a"), seed=0)
    with pytest.raises(
        ConfigTypeError, match=r"bad_wordz is not a sampling keyword.*\n.*bad_words_ids"
    ):
        engine.generate(PROMPTS, Sampling(extra={"bad_wordz": []}), seed=0)
    with pytest.raises(ConfigValueError, match=r"top_p=7.0 is out of range"):
        engine.generate(PROMPTS, Sampling(top_p=7.0), seed=0)
    with pytest.raises(ConfigValueError, match="transformers rejects"):
        engine.generate(PROMPTS, Sampling(extra={"cache_implementation": "x"}), seed=0)
    with pytest.raises(ConfigValueError, match="has 300 tokens"):
        engine.generate([[5] * 300], Sampling(), seed=0)


def test_a_completion_depends_on_its_row_and_not_on_the_call(engine: TransformersEngine) -> None:
    """A batch may be split over ranks, also within a group, or halved when memory runs out."""
    full_batch = engine.generate(PROMPTS, Sampling(n=4, max_tokens=8), seed=5)
    assert len({tuple(ids) for ids in full_batch.completion_ids}) == 8
    first = [PROMPTS[0]] * 4 + [PROMPTS[1]]
    parts = [(first, range(5)), ([PROMPTS[1]] * 3, range(5, 8))]
    partial_rollouts = [
        engine.generate(prompts, Sampling(max_tokens=8), seed=5, rows=rows)
        for prompts, rows in parts
    ]
    assert (
        partial_rollouts[0].completion_ids + partial_rollouts[1].completion_ids
        == full_batch.completion_ids
    )
    assert full_batch.logprobs is not None
    for partial, begin in zip(partial_rollouts, (0, 5), strict=True):
        assert partial.logprobs is not None
        for actual, expected in zip(partial.logprobs, full_batch.logprobs[begin:], strict=False):
            torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected))


def test_sampled_tokens_follow_the_probabilities() -> None:
    from toolkit.engine.hf_sampling import RowSampler

    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    rows = 4000
    sampler = RowSampler(range(rows), keep_scores=True)
    scores = probabilities.log().repeat(rows, 1)
    counts = torch.zeros(4)
    for _ in range(2):
        counts += sampler(torch.zeros(rows, 1), scores).argmax(-1).bincount(minlength=4)
    assert counts[1] == 0
    torch.testing.assert_close(counts / (2 * rows), probabilities, atol=0.02, rtol=0)
    assert all(torch.equal(kept, scores) for kept in sampler.scores)
    nan_scores = torch.full((rows, 4), torch.nan)
    with pytest.raises(ConfigValueError, match="logits are not finite") as refused:
        sampler(torch.zeros(rows, 1), nan_scores)
    assert refused.value.exit_code == 1


def test_a_completion_ends_at_a_stop_string(model: Any) -> None:
    from string import ascii_letters

    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = Tokenizer(models.WordLevel({c: i for i, c in enumerate(ascii_letters + "01 .")}, "."))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    letters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters)
    engine = TransformersEngine(model, pad_id=0, end_ids=[], tokenizer=tokenizer)
    unstopped = engine.generate([[5]], Sampling(max_tokens=12), seed=1).completion_ids[0]
    stop = tokenizer.decode(unstopped)[2:4]
    stopped = engine.generate([[5]], Sampling(max_tokens=12, extra={"stop": stop}), seed=1)
    assert stopped.completion_ids == [unstopped[:4]]
