"""LongRoPE above its original length is refused: engine and trainer would rotate positions
differently.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from transformers import Phi3Config

from toolkit.base.errors import UnsupportedError
from toolkit.policy.shared_weights import refuse_long_rope

LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}


def fake_model(**settings: object) -> SimpleNamespace:
    config = Phi3Config(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=128, **settings
    )
    return SimpleNamespace(config=config)


def fake_engine(max_model_len: int) -> SimpleNamespace:
    return SimpleNamespace(options=SimpleNamespace(max_model_len=max_model_len))


def test_a_max_seq_length_above_the_original_length_is_refused() -> None:
    model = fake_model(original_max_position_embeddings=64, rope_parameters=LONGROPE)
    refuse_long_rope(fake_engine(64), model)
    with pytest.raises(UnsupportedError, match="65 is above 64") as refused:
        refuse_long_rope(fake_engine(65), model)
    assert refused.value.where == "model.max_seq_length"
    assert str(refused.value.fix).startswith("set max_seq_length: 64")


def test_models_without_longrope_may_use_all_positions() -> None:
    refuse_long_rope(fake_engine(128), fake_model())
