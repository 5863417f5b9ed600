"""The interface of transformers through which engine/hf_sampling samples each row with its own
seed.
"""

from __future__ import annotations

import inspect

import pytest
from transformers import GenerationMixin

from toolkit.engine.hf_sampling import RowSampler

pytestmark = pytest.mark.contract


def test_generate_accepts_a_decoding_function() -> None:
    assert "custom_generate" in inspect.signature(GenerationMixin.generate).parameters
    source = inspect.getsource(GenerationMixin.generate)
    assert "decoding_method = custom_generate" in source, "generate does not use custom_generate"


def test_the_decoding_function_has_the_parameters_of_sample() -> None:
    our_parameters = list(inspect.signature(RowSampler.decode).parameters)[2:6]
    upstream_parameters = list(inspect.signature(GenerationMixin._sample).parameters)[1:5]
    assert our_parameters == upstream_parameters, "GenerationMixin._sample has other arguments"


def test_logits_processors_run_before_the_draw() -> None:
    source = inspect.getsource(GenerationMixin._sample)
    processors_at = source.index(
        "next_token_scores = logits_processor(input_ids, next_token_logits)"
    )
    assert processors_at < source.index("torch.multinomial"), (
        "GenerationMixin._sample draws before the processors"
    )
