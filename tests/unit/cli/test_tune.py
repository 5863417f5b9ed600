"""``toolkit tune``: the shapes that are tuned, and the errors if tuning is not possible."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from toolkit.base.errors import InputError, MissingExtraError
from toolkit.cli.tune import tune
from toolkit.engine import rollout_engine
from toolkit.sizing.lora_bytes import fused_shapes
from toolkit.sizing.spec import spec_from_values

if TYPE_CHECKING:
    from pathlib import Path

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}


def test_the_shapes_of_the_fused_layers_are_tuned() -> None:
    assert fused_shapes(spec_from_values(LLAMA, name="any")) == {
        ((4096, 1024, 1024), 4096),  # q, k, v
        ((4096,), 4096),  # o
        ((14336, 14336), 4096),  # gate, up
        ((4096,), 14336),  # down
    }


def test_without_vllm_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(LLAMA))
    monkeypatch.setattr(rollout_engine, "vllm_available", lambda: False)
    with pytest.raises(MissingExtraError, match="vLLM is not installed"):
        CliRunner().invoke(
            tune, [str(config), "--out", str(tmp_path / "t.json")], catch_exceptions=False
        )


def test_a_missing_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        CliRunner().invoke(
            tune, [str(tmp_path / "no"), "--out", str(tmp_path / "t")], catch_exceptions=False
        )
