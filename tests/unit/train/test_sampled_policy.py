"""With Hugging Face generation, too, the sampled policy is the trained policy, whether or not the
model has an engine object. Keywords that this generation does not read are refused.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_helpers import history, make_trainer

from toolkit.base.errors import ConfigValueError, ToolkitWarning
from toolkit.engine.hf_sampling import sample_completions
from toolkit.train.rollout import sampler
from toolkit.train.rollout.sampler import TransformersGeneration
from toolkit.train.step import kept_set

sys.path.append(str(Path(__file__).resolve().parents[2] / "fixtures"))
from tiny_llama import make_tokenizer

OPTIONS: dict[str, dict[str, Any]] = {
    "top_p": {"top_p": 0.9},
    "top_k": {"top_k": 4},
    "min_p": {"min_p": 0.1},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "all": {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 8,
        "min_p": 0.05,
        "repetition_penalty": 1.3,
    },
    "no top_k": {"top_k": -1, "temperature": 2},
}
PROMPTS = [[5, 6, 7, 8, 9], [10], [11, 5, 11]]


@pytest.mark.parametrize("name", OPTIONS)
def test_the_training_pass_has_the_logps_of_the_sampler(
    tmp_path: Path, monkeypatch: Any, name: str
) -> None:
    """Prompts of one batch have several lengths. Padding must not count as a seen token."""
    trainer = make_trainer(tmp_path, max_completion_length=12, **OPTIONS[name])
    scores: list[torch.Tensor] = []

    def record_scores(model: Any, prompts: Any, config: Any, seeds: Any, more: Any) -> Any:
        config.output_scores = config.return_dict_in_generate = True
        drawn = sample_completions(model, prompts, config, seeds, more)
        scores.extend(drawn[1])
        return drawn

    monkeypatch.setattr(sampler, "sample_completions", record_scores)
    monkeypatch.setattr(kept_set, "CHUNK_ELEMENTS", 100)
    trainer.completion_index.begin_batch(len(PROMPTS))
    completions = TransformersGeneration(trainer).generate(PROMPTS)
    left, right = max(map(len, PROMPTS)), max(map(len, completions))
    ids = torch.full((len(PROMPTS), left + right), 0)
    mask = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(zip(PROMPTS, completions, strict=True)):
        begin, end = left - len(prompt), left + len(completion)
        ids[row, begin:end] = torch.tensor([*prompt, *completion])
        mask[row, begin:end] = 1
    with torch.no_grad():
        ours, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, right)
    assert scores
    for position, scores_BV in enumerate(scores[:right]):
        logps_BV = torch.log_softmax(scores_BV, -1)
        theirs = logps_BV.gather(1, ids[:, left + position : left + position + 1])[:, 0]
        real = mask[:, left + position].bool()
        torch.testing.assert_close(ours[real, position], theirs[real], atol=1e-5, rtol=0)


def test_training_with_an_engine_object(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, engine=True, max_steps=2, **OPTIONS["all"])
    trainer.train()
    for row in history(trainer):
        assert row["sampling/logp_gap_max"] < 1e-5
        assert row["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-4)


def completions_of(trainer: Any) -> list[list[int]]:
    trainer.completion_index.begin_batch(len(PROMPTS))
    return TransformersGeneration(trainer).generate(PROMPTS)


def test_generation_options_of_the_checkpoint_are_not_used(tmp_path: Path) -> None:
    """transformers takes options that are not set from the generation config of the model."""
    plain = completions_of(make_trainer(tmp_path, max_completion_length=12))
    trainer = make_trainer(tmp_path, max_completion_length=12)
    config = trainer.model.generation_config
    config.no_repeat_ngram_size, config.suppress_tokens = 1, [plain[0][0]]
    config.num_beams, config.stop_strings, config.max_time = 4, ["x"], 1e-6
    assert completions_of(trainer) == plain
    assert config.no_repeat_ngram_size == 1
    assert trainer.model.generation_config is config


def test_stop_strings_end_only_completions_that_contain_them(tmp_path: Path) -> None:
    letters = make_tokenizer()
    whole = completions_of(make_trainer(tmp_path, max_completion_length=12))
    token = max(whole, key=len)[1]
    trainer = make_trainer(
        tmp_path,
        max_completion_length=12,
        generation_kwargs={"stop_strings": letters.decode([token])},
    )
    trainer._tokenizer = letters
    stopped = completions_of(trainer)
    ends = [row.index(token) + 1 if token in row else len(row) for row in whole]
    assert stopped == [row[:end] for row, end in zip(whole, ends, strict=True)]
    assert stopped != whole


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"max_new_token": 30},
            r"max_new_token is not a sampling keyword.*\n.*max_completion_length",
        ),
        ({"stop": ["a"]}, r"Hugging Face generation does not read it\n.*use stop_strings"),
        ({"presence_penalty": 1.0}, r"does not read it\n.*remove presence_penalty"),
        (
            {"max_new_tokens": 5},
            "max_new_tokens has the same meaning as grpo.max_completion_length",
        ),
        ({"typical_p": 1.5}, "1.5 is not a number above 0 and at most 1"),
        ({"num_beams": 4}, "not found by beam search"),
    ],
)
def test_keywords_are_refused_at_construction(tmp_path: Path, kwargs: Any, message: str) -> None:
    with pytest.raises(ConfigValueError, match=message):
        make_trainer(tmp_path, generation_kwargs=kwargs)


def test_a_keyword_that_training_does_not_apply_is_a_warning_at_construction(
    tmp_path: Path,
) -> None:
    with pytest.warns(
        ToolkitWarning, match=r"does not apply .*: typical_p\. So completions are sampled from"
    ):
        make_trainer(tmp_path, generation_kwargs={"typical_p": 0.9})
